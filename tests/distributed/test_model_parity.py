"""Loss and gradients of the parallel model equal one process's, for every layout."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from soar_mega.backends.torch import TorchBackend
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import (
    ParameterLayout,
    fill_parameter,
    layout_of,
    local_slice,
    real_part,
)
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import ModelInput, TextCondition
from tests.distributed.harness import run_ranks

CONFIG = MMDiTConfig(
    sample_size=8,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)


def config_of(heads: int, head_dim: int = 8) -> MMDiTConfig:
    """``CONFIG`` with another number of heads."""
    return replace(
        CONFIG,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        caption_projection_dim=heads * head_dim,
    )


def global_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(
    config: MMDiTConfig, mesh: Mesh, sequence_parallel: bool, recompute: str
) -> tuple[MMDiTStage, ShardedParameters]:
    stage = MMDiTStage(
        config,
        mesh,
        TorchBackend(),
        sequence_parallel=sequence_parallel,
        activation_checkpointing=recompute,  # type: ignore[arg-type]
    )
    stage = stage.double()
    for name, parameter in stage.named_parameters():
        layout = layout_of(parameter)
        whole = global_tensor(name, layout.global_shape).double()
        fill_parameter(parameter, mesh, whole[local_slice(layout, mesh)])
    stage.patch_embed.position.copy_(global_tensor("position", stage.patch_embed.position.shape))
    return stage, ShardedParameters([stage], mesh, torch.float64, torch.float64)


def inputs(rows: int, text_length: int) -> tuple[ModelInput, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    condition = TextCondition(draw(rows, text_length, 24), draw(rows, 20))
    timestep = torch.linspace(3, 997, rows, dtype=torch.float64)
    return ModelInput(draw(rows, 16, 6, 10), timestep, condition), draw(rows, 16, 6, 10)


def one_step(
    tensor_size: int,
    sequence_parallel: bool,
    text_length: int,
    recompute: str = "none",
    config: MMDiTConfig = CONFIG,
) -> dict[str, torch.Tensor]:
    """Squared error over 4 samples, split over data ranks; gradients of local slices by name."""
    mesh = Mesh.build(tensor_size)
    stage, parameters = build(config, mesh, sequence_parallel, recompute)
    x, target = inputs(4, text_length)
    own = slice(4 * mesh.data_rank // mesh.data_size, 4 * (mesh.data_rank + 1) // mesh.data_size)
    mine = ModelInput(
        x.latent_BCHW[own],
        x.timestep_B[own],
        TextCondition(x.condition.text_BTE[own], x.condition.pooled_BV[own]),
    )
    out = stage(mine)
    loss = (out - target[own]).square().sum()
    loss.backward()
    share = parameters.reduce_gradients()
    result = {"norm": parameters.gradient_norm(share), "out": out.detach()}
    for piece in parameters.fragments():
        values = share[piece.shard_start :][: piece.stop - piece.start]
        result[f"{piece.name}:{piece.start}"] = values.clone()
    return result


def padding(local: torch.Tensor, layout: ParameterLayout, mesh: Mesh) -> torch.Tensor:
    """The elements of a local tensor that are no part of the global one."""
    padded = torch.ones(local.shape, dtype=torch.bool)
    real_part(padded, layout, mesh).fill_(False)
    return local[padded]


def gathered(
    results: list[dict[str, torch.Tensor]], tensor_size: int, config: MMDiTConfig = CONFIG
) -> dict[str, torch.Tensor]:
    """Global gradients by name from every rank's fragments; those of padding must be zeros."""
    single = MMDiTStage(config, Mesh.single(), TorchBackend())
    whole = {
        n: torch.full(layout_of(p).global_shape, torch.nan) for n, p in single.named_parameters()
    }
    whole = {n: t.double() for n, t in whole.items()}
    for tensor_rank in range(tensor_size):
        local: dict[str, torch.Tensor] = {}
        mesh = Mesh(
            0, tensor_size, tensor_rank, tensor_size, 0, 1, None, None, None, torch.device("cpu")
        )
        for name, parameter in single.named_parameters():
            shape = layout_of(parameter).local_shape(tensor_size)
            local[name] = torch.full(shape, torch.nan, dtype=torch.float64)
        for result in results[tensor_rank::tensor_size]:
            for key, values in result.items():
                name, _, start = key.rpartition(":")
                if name:
                    local[name].view(-1)[int(start) : int(start) + len(values)] = values
        for name, parameter in single.named_parameters():
            layout = layout_of(parameter)
            index, found = local_slice(layout, mesh), real_part(local[name], layout, mesh)
            previous = whole[name][index]
            known = ~previous.isnan()
            torch.testing.assert_close(previous[known], found[known], rtol=1e-9, atol=1e-9)
            whole[name][index] = found
            assert padding(local[name], layout, mesh).eq(0).all(), name
    return whole


Case = tuple[int, bool, int, str, MMDiTConfig]

# 2 does not divide three heads, 2 and 4 do not divide seven; 38 are SD3.5-Large's.
THREE, SEVEN, LARGE = config_of(3), config_of(7), config_of(38, 4)

# (tensor size, sequence parallel, text tokens, recompute, model) by number of processes; one spawn
# runs all cases of a number, because starting processes costs more than the cases.
CASES: dict[int, list[Case]] = {
    2: [
        (2, False, 9, "none", CONFIG),
        (2, True, 9, "none", CONFIG),
        (2, True, 8, "selective", CONFIG),
        (1, False, 9, "none", CONFIG),
        (2, False, 9, "none", THREE),
        (2, True, 9, "selective", THREE),
    ],
    4: [
        (4, True, 7, "none", CONFIG),
        (4, False, 7, "selective", CONFIG),
        (2, True, 9, "full", CONFIG),
        (2, False, 8, "none", CONFIG),
        (1, False, 8, "selective", CONFIG),
        (4, True, 7, "none", SEVEN),
        (4, False, 7, "none", SEVEN),
        (2, True, 9, "full", SEVEN),
    ],
    8: [
        (8, True, 7, "none", LARGE),
        (8, False, 7, "none", LARGE),
        (4, True, 7, "selective", LARGE),
        (4, False, 7, "none", LARGE),
    ],
}


def all_cases(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    return [one_step(*case) for case in cases]


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.full)])
def test_gradients_equal_one_process(world: int) -> None:
    per_rank = run_ranks(world, all_cases, CASES[world])
    for index, (tensor, _, text_length, _, config) in enumerate(CASES[world]):
        results = [rank[index] for rank in per_rank]
        expected = one_step(1, False, text_length, config=config)
        outputs = torch.cat([result["out"] for result in results[::tensor]])
        torch.testing.assert_close(outputs, expected["out"], rtol=1e-10, atol=1e-10)
        for result in results:
            torch.testing.assert_close(result["norm"], expected["norm"], rtol=1e-10, atol=0)
        whole, reference = gathered(results, tensor, config), gathered([expected], 1, config)
        for name, gradient in reference.items():
            scale = max(gradient.norm().item(), 1e-6 * expected["norm"].item())
            assert (whole[name] - gradient).norm().item() <= 1e-9 * scale, (
                CASES[world][index],
                name,
            )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(recompute: str) -> None:
    expected, result = one_step(1, False, 9), one_step(1, False, 9, recompute)
    assert expected.keys() == result.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=0, atol=0, msg=name)
