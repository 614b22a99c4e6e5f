"""The executor over several ranks: gradients, loss terms and velocities of one process, bit for bit
where sums have one order; what ranks keep; sends that wait for their receive.

In fp64 and without a trainer around it; whole runs are test_pipeline_layouts' business.
"""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.config import SoarConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.layout import layout_of
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import MicroBatch, ModelInput, Objective, TextCondition
from soar_mega.pipeline.actions import Action, Kind
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.executor import Executor
from soar_mega.pipeline.schedules import SCHEDULES, build_schedule
from soar_mega.pipeline.simulator import simulate
from soar_mega.pipeline.stages import cut_layers
from tests.distributed.harness import run_ranks
from tests.distributed.test_model_parity import CONFIG, global_tensor

DEEP = replace(CONFIG, num_layers=8, dual_attention_layers=(0, 1, 2))
B, SIDE, TEXT = 2, 6, 5


@dataclass(frozen=True)
class Case:
    schedule: str
    microbatches: int
    synchronous: bool = False
    recompute: str = "none"
    collect: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float64


@dataclass
class Result:
    """What one rank had after a step.

    Attributes:
        gradients: By parameter.
        terms: Base and auxiliary loss terms of each microbatch, where the last stage is.
        left_behind: Tensors with a graph, more after a forward-only pass than before it.
        peak_kept: Most graphs and held weight gradients at a time, in microbatches.
        planned_live: What the simulator says of that.
        velocities: Of forwards alone.
    """

    gradients: dict[str, Tensor]
    terms: list[tuple[Tensor, Tensor]]
    left_behind: Counter[str]
    peak_kept: float
    planned_live: float
    velocities: list[Tensor]


SETTINGS: dict[str, Any] = {
    "trajectory_length": 3,
    "aux_group_size": 2,
    "num_rollout_paths": 2,
    "lambda_aux": 0.7,
}


def objective(changes: tuple[tuple[str, Any], ...] = ()) -> Objective:
    config = SoarConfig(name="soar", **SETTINGS | dict(changes))
    return make_objective(config, shift=3.0, seed=5, dtype=torch.float64)


def microbatch(number: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def condition(rows: int) -> TextCondition:
        return TextCondition(draw(rows, TEXT, 24), draw(rows, 20))

    slots = torch.arange(B * number, B * number + B)
    return MicroBatch(3, slots, draw(B, 16, SIDE, SIDE), condition(B), condition(1), torch.ones(B))


def inputs(count: int) -> list[ModelInput]:
    """Of forwards alone; the last has fewer rows."""
    made = []
    for number in range(count):
        micro = microbatch(100 + number)
        rows = slice(0, 1 if number == count - 1 else B)
        text = TextCondition(micro.prompt.text_BTE[rows], micro.prompt.pooled_BV[rows])
        timestep = torch.full((len(text.pooled_BV),), 300.0 + number, dtype=torch.float64)
        made.append(ModelInput(micro.clean_BCHW[rows], timestep, text))
    return made


def build(mesh: Mesh, layers: range, recompute: str) -> MMDiTStage:
    stage = MMDiTStage(
        DEEP,
        mesh,
        TorchBackend(),
        layers=layers,
        activation_checkpointing=recompute,  # type: ignore[arg-type]
    ).double()
    for name, parameter in stage.named_parameters():
        whole = global_tensor(name, layout_of(parameter).global_shape)
        parameter.data.copy_(whole.reshape(parameter.shape))
    if stage.is_first:
        position = stage.patch_embed.position
        position.copy_(global_tensor("position", position.shape))
    return stage


class Watch:
    """Looks at what an executor keeps, action by action.

    Args:
        collect: Count graphs by asking the garbage collector, which takes long.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, collect: bool) -> None:
        self.left_behind: Counter[str] = Counter()
        self.peak_kept = 0.0
        original = Executor._forward

        def forward(executor: Executor, action: Action) -> None:
            p = executor._step.by_name[action.pass_name]
            look = collect and not p.grad
            before = graphs() if look else 0
            original(executor, action)
            if look:
                self.left_behind[p.kind] += graphs() - before
            kept = [*executor._graphs, *executor._weight_work]
            live = sum(executor._step.by_name[name].states for name, _, _ in kept)
            self.peak_kept = max(self.peak_kept, live / executor._place.chunks)

        monkeypatch.setattr(Executor, "_forward", forward)


def graphs() -> int:
    gc.collect()
    return sum(1 for item in gc.get_objects() if type(item) is Tensor and item.grad_fn is not None)


def run_case(mesh: Mesh, case: Case) -> Result:
    soar = objective(case.settings)
    schedule = build_schedule(
        case.schedule, soar.passes(), ranks=mesh.pipeline_size, microbatches=case.microbatches
    )
    place = schedule.step.placement
    cut = cut_layers([1.3] * 3 + [1.0] * 5, 0.1, 0.1, place.stages)
    stages = [
        build(mesh, cut[place.stage(mesh.pipeline_rank, chunk)], case.recompute)
        for chunk in range(place.chunks)
    ]
    parameters = ShardedParameters(stages, mesh, case.dtype, torch.float64)
    pipeline = Pipeline(stages, mesh, schedule, synchronous_sends=case.synchronous)
    micros = [microbatch(number) for number in range(case.microbatches)]
    counts = torch.stack([soar.count(micro) for micro in micros]).sum(dim=0)
    velocities = pipeline.forward_everywhere(inputs(3))
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch, collect=case.collect)
        terms = pipeline.train_step(soar, micros, soar.normaliser(counts))
    assert parameters.flat_grad.any()
    return Result(
        {n: p.main_grad.clone() for s in stages for n, p in s.named_parameters()},
        [(term.base_B, term.aux_KB) for term in terms],
        watch.left_behind,
        watch.peak_kept,
        float(simulate(schedule).peak_live[mesh.pipeline_rank]),
        velocities,
    )


def run_cases(cases: list[Case]) -> list[Result]:
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh = Mesh.build(pipeline_size=size)
    return [run_case(mesh, case) for case in cases]


CASES: dict[int, list[Case]] = {
    1: [Case(schedule, 2) for schedule in SCHEDULES],
    2: [
        *(Case(name, 1, synchronous=True, collect=True) for name in SCHEDULES),
        *(Case(name, 3) for name in SCHEDULES),
        Case("zero_bubble", 2, recompute="full"),
        Case("zero_bubble_v", 2, recompute="selective"),
        Case("zero_bubble", 2, settings=(("reuse_base_forward", False),)),
        Case("1f1b", 2, settings=(("cfg_scale_sampling", 1.0),)),
        Case("zero_bubble_v", 2, settings=(("lambda_aux", 0.0),)),
        *(Case(name, 2, dtype=torch.bfloat16) for name in ("zero_bubble", "zero_bubble_v")),
    ],
    4: [Case(name, m, synchronous=m == 4) for name, m in product(SCHEDULES, (2, 4))],
}


@pytest.mark.parametrize("world", CASES)
def test_equals_one_process(world: int) -> None:
    ranks = run_ranks(world, run_cases, CASES[world])
    alone: dict[Case, Result] = {}
    for number, case in enumerate(CASES[world]):
        like = Case("1f1b", case.microbatches, settings=case.settings, dtype=case.dtype)
        if like not in alone:
            alone[like] = run_cases([like])[0]
        compare([rank[number] for rank in ranks], alone[like], case)


def compare(results: list[Result], expected: Result, case: Case) -> None:
    gradients: dict[str, Tensor] = {}
    for result in results:
        assert not gradients.keys() & result.gradients.keys(), "a parameter belongs to one rank"
        gradients |= result.gradients
    assert gradients.keys() == expected.gradients.keys()
    # In bf16 the conditioning's gradient is rounded where stages meet; losses are the same bits.
    close = 1e-11 if case.dtype == torch.float64 else 0.02
    for name, gradient in expected.gradients.items():
        assert (gradients[name] - gradient).norm() <= close * gradient.norm(), (case, name)
    told = [result.terms for result in results if result.terms]
    assert len(told) == 1
    assert all(map(torch.equal, flat(told[0]), flat(expected.terms))), case
    for result in results:
        assert all(map(torch.equal, result.velocities, expected.velocities)), case
        if case.collect:
            assert not +result.left_behind and set(result.left_behind) == {"rollout"}, case
        assert 0 < result.peak_kept == result.planned_live, case


def flat(terms: list[Any]) -> list[Tensor]:
    return [tensor for term in terms for tensor in term]


def test_first_action_of_every_rank_is_the_first_base_pass() -> None:
    """Transformer Engine caches its FP8 weights in the first pass, which must be a training one."""
    for name in SCHEDULES:
        schedule = build_schedule(name, objective().passes(), ranks=4, microbatches=3)
        for actions in schedule.actions:
            compute = [a for a in actions if a.channel is None]
            assert compute[0] == Action(Kind.FORWARD, "base", 0)
