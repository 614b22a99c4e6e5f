"""Which tensor-parallel sizes an architecture can be cut into."""

from __future__ import annotations

import math

import pytest

from soar_mega.model.config import MMDiTConfig


@pytest.mark.parametrize(
    ("heads", "head_dim", "sizes"),
    [
        (38, 64, [1, 2, 4, 8, 19, 38]),  # SD3.5-Large
        (24, 64, [1, 2, 3, 4, 6, 8, 12, 24]),  # SD3.5-Medium
        (7, 8, [1, 2, 4, 7]),
        (6, 8, [1, 2, 3, 6]),  # 4 divides the width, but two heads a rank leave the fourth none
        (3, 3, [1, 3]),  # two ranks would have heads, but the width is 9
    ],
)
def test_tensor_sizes_that_work(heads: int, head_dim: int, sizes: list[int]) -> None:
    config = MMDiTConfig(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        caption_projection_dim=heads * head_dim,
    )
    for size in range(1, 2 * heads):
        if size in sizes:
            config.check_tensor_parallel(size)
            continue
        with pytest.raises(ValueError) as caught:
            config.check_tensor_parallel(size)
        assert str(caught.value) == (
            f"parallel.tensor_model_parallel_size is {size}, but it must divide the model's width "
            f"{heads * head_dim}, and {math.ceil(heads / size)} of its {heads} attention heads on "
            f"each rank must leave no rank without: use one of {sizes}"
        )
