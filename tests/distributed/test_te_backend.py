"""The Transformer Engine backend on a stand-in: two SOAR steps have the torch backend's gradients.

The stand-in rounds nothing, so what is tested is the wiring: padding, groups, weight caches, the
order of weight gradients, biases, contexts. Numerics need a GPU (tests/gpu).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from soar_mega.backends import Backend
from soar_mega.backends.te.backend import TEBackend
from soar_mega.backends.te.recipes import RecipeName
from soar_mega.backends.torch import TorchBackend
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import fill_parameter, layout_of, local_slice
from soar_mega.parallel.mesh import Mesh, stage_group
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.pipeline.stages import cut_layers
from tests import te_stand_in
from tests.distributed.harness import run_ranks
from tests.distributed.test_executor import DEEP, microbatch, objective
from tests.distributed.test_model_parity import global_tensor


@dataclass(frozen=True)
class Case:
    """What is neither tensor nor pipeline parallel is data parallel."""

    recipe: RecipeName | None = "current"
    schedule: str = "1f1b"
    pipeline: int = 1
    tensor: int = 1
    sequence: bool = False
    recompute: str = "none"
    bf16_layers: tuple[int, ...] = ()
    microbatches: int = 2


# By number of processes: one spawn runs all cases.
CASES: dict[int, list[Case]] = {
    1: [
        Case(None),
        Case("block", recompute="full"),
        Case("delayed", bf16_layers=(0, 7)),
        Case("current", "zero_bubble", bf16_layers=(1,)),
        Case(None, "zero_bubble"),
    ],
    2: [
        Case("current", tensor=2, sequence=True),
        Case("delayed", tensor=2, sequence=True),
        Case(None, "zero_bubble", tensor=2, sequence=True),
        Case("current", "zero_bubble_v", pipeline=2, microbatches=3),
    ],
}
MORE: dict[int, list[Case]] = {
    1: [Case("current"), Case("current", "zero_bubble_v")],
    2: [
        Case("current", tensor=2),
        Case(None, tensor=2, sequence=True),
        Case("delayed"),
        Case("block", tensor=2, sequence=True, recompute="full"),
        Case("current", "zero_bubble", tensor=2),
        *(
            Case("current", schedule, pipeline=2, microbatches=3)
            for schedule in ("1f1b", "interleaved_1f1b", "zero_bubble")
        ),
    ],
    4: [
        Case("current", "zero_bubble", pipeline=2, tensor=2, sequence=True),
        Case("delayed", "1f1b", pipeline=2, tensor=2, sequence=True),
        Case("delayed", "interleaved_1f1b", pipeline=2),
    ],
}


def two_steps(case: Case, mesh: Mesh, backend: Backend) -> list[dict[str, Tensor]]:
    soar = objective()
    schedule = build_schedule(
        case.schedule, soar.passes(), ranks=mesh.pipeline_size, microbatches=case.microbatches
    )
    place = schedule.step.placement
    cut = cut_layers([1.3] * 3 + [1.0] * 5, 0.1, 0.1, place.stages)
    stages = [
        MMDiTStage(
            DEEP,
            mesh,
            backend,
            layers=cut[place.stage(mesh.pipeline_rank, chunk)],
            sequence_parallel=case.sequence,
            activation_checkpointing=case.recompute,  # type: ignore[arg-type]
        ).double()
        for chunk in range(place.chunks)
    ]
    for stage in stages:
        for name, parameter in stage.named_parameters():
            layout = layout_of(parameter)
            whole = global_tensor(name, layout.global_shape).double()
            fill_parameter(parameter, mesh, whole[local_slice(layout, mesh)])
        if stage.is_first:
            position = stage.patch_embed.position
            position.copy_(global_tensor("position", position.shape))
    parameters = ShardedParameters(stages, mesh, torch.float64, torch.float64)
    pipeline = Pipeline(stages, mesh, schedule)
    micros = [microbatch(10 * mesh.data_rank + number) for number in range(case.microbatches)]
    counts = torch.stack([soar.count(micro) for micro in micros]).sum(dim=0)
    found = []
    for _ in range(2):
        parameters.flat_grad.fill_(torch.nan)
        parameters.zero_gradients()
        with backend.training_step(watch=True):
            pipeline.train_step(soar, micros, soar.normaliser(counts))
        parameters.reduce_gradients()  # the two backends pad, and so cut tokens, differently
        found.append({n: p.main_grad.clone() for s in stages for n, p in s.named_parameters()})
        parameters.flat.mul_(1.25)  # what a cached weight must not outlive
    return found


def compare(case: Case, world: te_stand_in.World) -> None:
    mesh = Mesh.build(case.tensor, pipeline_size=case.pipeline)
    backend = TEBackend(
        case.recipe,
        bf16_layers=case.bf16_layers,
        split_backwards=case.schedule.startswith("zero_bubble"),
        amax_group=stage_group(mesh) if case.recipe == "delayed" else None,
    )
    expected = two_steps(case, mesh, TorchBackend())
    found = two_steps(case, mesh, backend)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        largest = max(gradient.norm() for gradient in other.values())
        for name, gradient in other.items():
            scale = max(gradient.norm(), 1e-6 * largest)
            assert (one[name] - gradient).norm() <= 1e-9 * scale, (case, step, name)
    linears = [facts for kind, facts in world.calls if kind == "linear"]
    assert all(facts["fp8"] == (case.recipe is not None) for facts in linears)
    firsts = [facts for facts in linears if facts["first"]]
    assert all(facts["grad"] for facts in firsts)
    # Once in each of the two steps, and whenever that pass is computed again.
    assert len(firsts) == 2 * len(world.linears)
    assert len(backend.statistics()) == (6 if case.recipe else 0)
    if case.recipe == "delayed" and mesh.world_size > 1:
        assert {group for _, group in world.reduced} == {backend.amax_group}
        passes = 2 * case.microbatches * sum(p.grad for p in objective().passes())
        for direction in ("scaling_fwd", "scaling_bwd"):
            chunks = 2 if case.schedule == "interleaved_1f1b" else 1
            assert world.reduced.count((direction, backend.amax_group)) == passes * chunks
        for state in (
            linear.fp8_meta[direction]
            for linear in world.linears
            for direction in ("scaling_fwd", "scaling_bwd")
        ):
            assert state.amax_history.any()
            largest = state.amax_history.clone()
            torch.distributed.all_reduce(
                largest, torch.distributed.ReduceOp.MAX, group=backend.amax_group
            )
            assert torch.equal(largest, state.amax_history)


def compare_all(cases: list[Case]) -> None:
    for case in cases:
        # A world of one is this process, where other tests want no Transformer Engine.
        with pytest.MonkeyPatch.context() as patch:
            compare(case, te_stand_in.install(patch))


@pytest.mark.parametrize("world", CASES)
def test_gradients_equal_the_torch_backends(world: int) -> None:
    run_ranks(world, compare_all, CASES[world])


@pytest.mark.full
@pytest.mark.parametrize("world", MORE)
def test_more_layouts(world: int) -> None:
    run_ranks(world, compare_all, MORE[world])
