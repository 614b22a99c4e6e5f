"""Runs with pipeline stages equal the single process's: losses, gradient norms, weights.

Every schedule, alone and with tensor, sequence and data parallelism. One spawn of a number of
processes runs all its cases, because starting processes costs more than the cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from soar_mega.pipeline.schedules import SCHEDULES
from tests.distributed.harness import run_ranks
from tests.distributed.test_training_layouts import (
    COMPARED,
    STEPS,
    Case,
    Result,
    compare_weights,
    train_case,
)
from tests.runs import SIZES, Tiny, checkpoint, make_small_tiny

LAYERS = 8


@dataclass(frozen=True)
class Layout:
    """A pipeline layout; what is neither tensor nor pipeline parallel is data parallel."""

    objective: str
    schedule: str
    pipeline: int
    tensor: int = 1
    sequence: bool = False
    micro: int = 2
    overrides: tuple[str, ...] = ()

    @property
    def case(self) -> Case:
        overrides = (
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            f"parallel.pipeline_schedule={self.schedule}",
            *self.overrides,
        )
        return Case(self.objective, self.tensor, self.sequence, self.micro, overrides)

    @property
    def alone(self) -> Case:
        """The same on one process."""
        return Case(self.objective, micro=self.micro, overrides=self.overrides)


def train_layouts(tiny: Tiny, folder: Path, layouts: list[Layout]) -> list[Result]:
    return [train_case(tiny, folder, layout.case) for layout in layouts]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny folder whose model has enough layers for 4 ranks of 2 stages."""
    return make_small_tiny(tmp_path_factory.mktemp("deep"), replace(SIZES, num_layers=LAYERS))


Reference = Callable[[Case], tuple[Result, Path]]


@pytest.fixture(scope="module")
def reference(deep: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")

    @cache
    def made(case: Case) -> tuple[Result, Path]:
        return train_case(deep, folder, case), checkpoint(folder / case.name, STEPS)

    return made


# By number of processes; M = 8 over micro and data-parallel size. More M: test_executor.
SOME: dict[int, list[Layout]] = {
    1: [Layout("soar", schedule, 1) for schedule in ("zero_bubble", "zero_bubble_v")],
    2: [
        *(Layout("soar", schedule, 2) for schedule in SCHEDULES),
        Layout("pretrain", "zero_bubble_v", 2, micro=8),
        # Aux passes that wait for nothing: several passes with gradient and no hand-over.
        Layout("soar", "zero_bubble", 2, overrides=("objective.aux_states=ideal",)),
        Layout("soar", "interleaved_1f1b", 2, overrides=("objective.aux_states=independent",)),
    ],
    4: [
        Layout("soar", "zero_bubble_v", 4),
        Layout("pretrain", "interleaved_1f1b", 4),
        Layout("soar", "1f1b", 2, tensor=2, sequence=True, micro=4),
        Layout("soar", "zero_bubble", 2, micro=2),  # data parallel 2
    ],
}


@pytest.mark.parametrize("world", SOME)
def test_some_layouts(world: int, deep: Tiny, tmp_path: Path, reference: Reference) -> None:
    compare(
        run_ranks(world, train_layouts, deep, tmp_path, SOME[world]), world, tmp_path, reference
    )


def every(world: int, pipeline: int, objective: str) -> list[Layout]:
    """All of a number of processes: sequence parallel on about half of the tensor-parallel ones."""
    found = []
    for tensor, data in product((1, 2), (1, 2)):
        if pipeline * tensor * data == world:
            for at, schedule in enumerate(SCHEDULES):
                sequence = tensor == 2 and (at + pipeline // 2) % 2 == 0
                micro = (1, 2, 4)[at % 3]
                found.append(Layout(objective, schedule, pipeline, tensor, sequence, micro))
    return found


@pytest.mark.full
@pytest.mark.parametrize("objective", ["pretrain", "soar"])
@pytest.mark.parametrize(
    ("world", "pipeline"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (8, 4)]
)
def test_every_layout(
    world: int, pipeline: int, objective: str, deep: Tiny, tmp_path: Path, reference: Reference
) -> None:
    layouts = every(world, pipeline, objective)
    ranks = run_ranks(world, train_layouts, deep, tmp_path, layouts)
    compare(ranks, world, tmp_path, reference, layouts)


def compare(
    ranks: list[list[Result]],
    world: int,
    folder: Path,
    reference: Reference,
    layouts: list[Layout] | None = None,
) -> None:
    for number, layout in enumerate(layouts or SOME[world]):
        wanted, wanted_path = reference(layout.alone)
        only_pipeline = layout.pipeline == world
        tolerance = 1e-6 if only_pipeline else 1e-5
        draws = {}
        for result in (rank[number] for rank in ranks):
            draws |= result.draws
            assert len(result.metrics) == STEPS
            for step, (found, expected) in enumerate(
                zip(result.metrics, wanted.metrics, strict=True)
            ):
                assert found.keys() == expected.keys()
                for name in COMPARED:
                    if name in expected:
                        right = pytest.approx(expected[name], rel=tolerance, abs=0)
                        assert found[name] == right, (layout, step, name)
            if only_pipeline:
                first, alone = result.metrics[0], wanted.metrics[0]
                assert first["train/loss"] == alone["train/loss"], layout
        assert draws == wanted.draws, layout
        way = sum(expected["optim/lr"] for expected in wanted.metrics)
        compare_weights(layout.case, checkpoint(folder / layout.case.name, STEPS), wanted_path, way)
