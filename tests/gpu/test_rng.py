"""Draws have the same bits on a GPU as on a CPU. Needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from soar_mega.rng import Purpose, normal, uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("draw", [uniform, normal])
def test_draws_have_the_same_bits(draw: Callable[..., torch.Tensor]) -> None:
    slots = torch.arange(64)
    cpu = draw(7, Purpose.NOISE, 3, slots, 65536)
    gpu = draw(7, Purpose.NOISE, 3, slots, 65536, device="cuda")
    assert torch.equal(cpu, gpu.cpu())
