"""apex' and Transformer Engine's FusedAdam update as torch's fused AdamW does."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic", reason="pydantic is not installed")

from soar_mega.config.schema import OptimizerConfig
from soar_mega.launch.optional import is_there
from soar_mega.training.optimizer import ShardOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def after(name: str, updates: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator("cuda").manual_seed(0)
    share = torch.randn(1_000_003, generator=draw, device="cuda")
    config = OptimizerConfig(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer = ShardOptimizer(share, config)
    for number in range(updates):
        gradient = torch.randn(share.shape, generator=draw, device="cuda")
        optimizer.update(gradient, lr=1e-2 / (number + 1))
    assert optimizer.step == updates
    return optimizer._parameter.detach(), optimizer.exp_avg, optimizer.exp_avg_sq


@pytest.mark.parametrize(
    ("name", "package"), [("apex_fused_adam", "apex"), ("te_fused_adam", "transformer_engine")]
)
def test_same_result_as_torchs(name: str, package: str) -> None:
    if not is_there(package):
        pytest.skip(f"{package} is not installed")
    for got, expected in zip(after(name, 10), after("adamw", 10), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
