"""Compiled blocks on several ranks: the gradients of eager ones, collectives inside a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.init import initialise
from soar_mega.model.recompute import Recompute, compiled_run_block, run_block
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from tests.distributed.harness import run_ranks
from tests.distributed.test_model_parity import CONFIG, inputs

# One graph a pass, the last block's, and with a dual one before it two.
SHORT = replace(CONFIG, num_layers=1, dual_attention_layers=())
LONG = replace(CONFIG, num_layers=2)


def gradients(
    model: MMDiTConfig, recompute: str, sequence_parallel: bool, compiled: bool
) -> Tensor:
    """Velocity, then the flat gradient, of one pass over a model cut between two ranks."""
    mesh = Mesh.build(2)
    stage = MMDiTStage(
        model,
        mesh,
        TorchBackend(),
        sequence_parallel=sequence_parallel,
        activation_checkpointing=Recompute(recompute).value,
        call_block=compiled_run_block(backend="aot_eager") if compiled else run_block,
    )
    initialise(stage, 4)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():  # gates begin at zero
            shake = torch.Generator().manual_seed(len(name) + mesh.tensor_rank)
            parameter += 0.1 * torch.randn(parameter.shape, generator=shake)
    parameters = ShardedParameters([stage.double()], mesh, torch.float64, torch.float64)
    x, target = inputs(2, 5)  # 15 image and 5 text tokens: padding for two ranks
    out = stage(x)
    (out - target).square().sum().backward()
    return torch.cat([out.detach().flatten(), parameters.flat_grad])


def both(*case: Any) -> list[Tensor]:
    return [gradients(*case, compiled) for compiled in (True, False)]


@pytest.mark.parametrize(
    ("model", "recompute", "sequence_parallel"),
    [
        (SHORT, "none", True),
        *(
            pytest.param(LONG, str(recompute), sequence_parallel, marks=pytest.mark.full)
            for recompute in Recompute
            for sequence_parallel in (False, True)
        ),
    ],
)
def test_two_tensor_ranks_have_the_gradients_of_eager_blocks(
    model: MMDiTConfig, recompute: str, sequence_parallel: bool
) -> None:
    for compiled, eager in run_ranks(2, both, model, recompute, sequence_parallel):
        assert eager.abs().sum() > 0
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)
