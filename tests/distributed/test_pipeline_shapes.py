"""Microbatches of different latent shapes in one step, as aspect buckets give them: losses,
gradients and velocities are those of one process.

In fp64. 4x8 and 8x4 have as many tokens as each other in another order; 6x6 has an odd number of
them, so that sequence parallel pads it alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.config import FlowMatchingConfig, SoarConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.layout import fill_parameter, layout_of, local_slice
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import LossTerms, MicroBatch, ModelInput, Objective, TextCondition
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.pipeline.stages import cut_layers
from soar_mega.training.report import loss_metrics
from tests.distributed.harness import run_ranks
from tests.distributed.test_model_parity import CONFIG, gathered, global_tensor

MODEL = replace(CONFIG, num_layers=4, dual_attention_layers=(0, 1))
# (rows, height, width) of each microbatch of the global batch.
SHAPES = ((2, 4, 8), (2, 8, 4), (1, 6, 6), (1, 4, 8), (2, 12, 2), (2, 6, 6))
SLOTS = sum(rows for rows, _, _ in SHAPES)
TEXT, BINS = 5, 4


@dataclass(frozen=True)
class Case:
    schedule: str
    objective: str
    tensor: int
    pipeline: int


CASES = [
    *(Case(s, o, 2, 2) for s in ("1f1b", "zero_bubble") for o in ("flow_matching", "soar")),
    # The data-parallel ranks have different shapes at the same time.
    Case("interleaved_1f1b", "soar", 1, 2),
    Case("zero_bubble_v", "soar", 1, 2),
]


@dataclass
class Result:
    """What one rank had after a step.

    Attributes:
        gradients: Shares of local gradients by ``name:start``, and their norm.
        terms: Base and auxiliary loss terms of each microbatch, where the last stage is.
        metrics: Of the whole step.
        velocities: Of forwards alone.
    """

    gradients: dict[str, Tensor]
    terms: list[tuple[Tensor, Tensor]]
    metrics: dict[str, float]
    velocities: list[Tensor]


def objective(name: str) -> Objective:
    config: Any = FlowMatchingConfig(name="flow_matching")
    if name == "soar":
        config = SoarConfig(
            name="soar",
            trajectory_length=2,
            num_rollout_paths=2,
            aux_group_size=2,
            lambda_aux=0.7,
        )
    return make_objective(config, shift=3.0, seed=5, dtype=torch.float64)


def microbatches() -> list[MicroBatch]:
    """The global batch."""
    made, first = [], 0
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    empty = TextCondition(draw(1, TEXT, 24), draw(1, 20))
    for rows, height, width in SHAPES:
        slots = torch.arange(first, first + rows)
        prompt = TextCondition(draw(rows, TEXT, 24), draw(rows, 20))
        clean_BCHW = draw(rows, 16, height, width)
        made.append(MicroBatch(3, slots, clean_BCHW, prompt, empty, torch.ones(rows)))
        first += rows
    return made


def build(mesh: Mesh, layers: range) -> MMDiTStage:
    stage = MMDiTStage(MODEL, mesh, TorchBackend(), layers=layers, sequence_parallel=True).double()
    for name, parameter in stage.named_parameters():
        layout = layout_of(parameter)
        whole = global_tensor(name, layout.global_shape).double()
        fill_parameter(parameter, mesh, whole[local_slice(layout, mesh)])
    if stage.is_first:
        position = stage.patch_embed.position
        position.copy_(global_tensor("position", position.shape))
    return stage


def run_case(case: Case) -> Result:
    mesh = Mesh.build(case.tensor, pipeline_size=case.pipeline)
    made = objective(case.objective)
    whole = microbatches()
    share = len(whole) // mesh.data_size
    micros = whole[mesh.data_rank * share : (mesh.data_rank + 1) * share]
    schedule = build_schedule(
        case.schedule, made.passes(), ranks=mesh.pipeline_size, microbatches=len(micros)
    )
    place = schedule.step.placement
    cut = cut_layers([1.3] * 2 + [1.0] * 2, 0.1, 0.1, place.stages)
    stages = [
        build(mesh, cut[place.stage(mesh.pipeline_rank, chunk)]) for chunk in range(place.chunks)
    ]
    parameters = ShardedParameters(stages, mesh, torch.float64, torch.float64)
    pipeline = Pipeline(stages, mesh, schedule)
    velocities = pipeline.forward_everywhere(
        [
            ModelInput(m.clean_BCHW, 100.0 * (1 + m.slots_B.double()), m.prompt)
            for m in whole  # every data-parallel rank looks at all of them
        ]
    )
    counts = torch.stack([made.count(micro) for micro in whole]).sum(dim=0)
    terms: list[LossTerms] = pipeline.train_step(made, micros, made.normaliser(counts))
    shard = parameters.reduce_gradients()
    gradients = {"norm": parameters.gradient_norm(shard)}
    for piece in parameters.fragments():
        values = shard[piece.shard_start :][: piece.stop - piece.start]
        gradients[f"{piece.name}:{piece.start}"] = values.clone()
    states = sum(p.states for p in made.passes() if p.kind == "aux")
    metrics = loss_metrics(terms, micros, states, SLOTS, 0.7 if states else 0.0, BINS, mesh)
    return Result(gradients, [(term.base_B, term.aux_KB) for term in terms], metrics, velocities)


def run_cases() -> list[Result]:
    return [run_case(case) for case in CASES]


@pytest.fixture(scope="module")
def on_four() -> list[list[Result]]:
    return run_ranks(4, run_cases)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.schedule}-{c.objective}-tp{c.tensor}")
def test_equals_one_process(on_four: list[list[Result]], case: Case) -> None:
    results = [rank[CASES.index(case)] for rank in on_four]
    expected = run_case(replace(case, schedule="1f1b", tensor=1, pipeline=1))
    assert [v.shape[-2:] for v in expected.velocities] == [shape[1:] for shape in SHAPES]
    for result in results:
        for got, want in zip(result.velocities, expected.velocities, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert result.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            assert result.metrics[name] == pytest.approx(value, rel=1e-10), name
        assert result.metrics == results[0].metrics, "the same bits on every rank"

    told = [term for r in results[:: case.tensor] for term in r.terms]
    assert len(told) == len(SHAPES)
    for got_terms, want_terms in zip(told, expected.terms, strict=True):
        for got, want in zip(got_terms, want_terms, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    norm = expected.gradients["norm"]
    assert norm > 0
    whole = gathered([r.gradients for r in results], case.tensor, MODEL)
    for name, gradient in gathered([expected.gradients], 1, MODEL).items():
        scale = max(gradient.norm().item(), 1e-6 * norm.item())
        assert (whole[name] - gradient).norm().item() <= 1e-9 * scale, name
    for result in results:
        torch.testing.assert_close(result.gradients["norm"], norm, rtol=1e-10, atol=0)


def test_bins_and_losses_count_samples_whatever_their_shape() -> None:
    """A picture of few cells weighs as much as one of many."""
    case = Case("1f1b", "flow_matching", 1, 1)
    result = run_case(case)
    base = torch.cat([base for base, _ in result.terms])
    assert result.metrics["train/loss"] == pytest.approx(float(base.mean()), rel=1e-12)
    made = objective("flow_matching")
    sigma = torch.cat([made.begin(micro).sigma_B for micro in microbatches()])
    which = (sigma * BINS).long().clamp(0, BINS - 1)
    seen = {n for n in result.metrics if "_t_bin_" in n}
    assert seen == {f"train/loss_t_bin_{k}" for k in which.unique().tolist()}
    for k in which.unique().tolist():
        mean = float(base[which == k].mean())
        assert result.metrics[f"train/loss_t_bin_{k}"] == pytest.approx(mean, rel=1e-12)
