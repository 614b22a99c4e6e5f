"""Runs that lose a process to SIGKILL, anywhere in a step or in a save, go on as if unbroken.

A schedule is drawn from (layout, step, process, kill point, layout of the restart). Kill points of
a save are the changes of files that an unbroken run made in the save of that step: before a folder
is made, before and amid writing, before syncing, renaming, deleting.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import warm_context
from tests.runs import Tiny, assert_same_state, checkpoint, metrics, state
from tests.system.kill_points import Change, Watch, train_watched
from tests.system.test_lost_rank import free_port

STEPS, EVERY = 6, 2
LIMIT_S, TIMEOUT_S = 60.0, 30.0
RELATIVE = 1e-5
COMPARED = ("step", "train/loss", "optim/grad_norm", "optim/lr")


@dataclass(frozen=True)
class Layout:
    """What of it is neither tensor nor pipeline parallel is data parallel."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"


ALONE, DATA, TENSOR = Layout(1), Layout(2), Layout(2, tensor=2)
LAYOUTS = [
    ALONE,
    DATA,
    TENSOR,
    Layout(2, pipeline=2),
    Layout(3),
    Layout(3, pipeline=3, schedule="zero_bubble"),
    Layout(4, tensor=2),
    Layout(4, tensor=2, pipeline=2),
]


@dataclass(frozen=True)
class Schedule:
    """One process is killed.

    Attributes:
        a, b: Layout until then, and of the restart.
        step: In it, or in the save after it.
        rank: Who.
        call: The kind of change at which it dies; None: it dies within the step.
        place: Which of those changes, from 0 (the first) to 1.
    """

    a: Layout
    b: Layout
    step: int
    rank: int
    call: str | None = None
    place: float = 0.0


@dataclass(frozen=True)
class Unbroken:
    """A run that nobody disturbed, and what each rank did to its checkpoints."""

    run_dir: Path
    changes: list[list[Change]]


def start(
    tiny: Tiny, layout: Layout, run_dir: Path, watches: list[Watch], resume: str
) -> list[Any]:
    """The training command on as many processes, each with its watch."""
    arguments = tiny.arguments(
        "sft",
        run_dir,
        f"data.shards={tiny.shards('few')}",
        "run.name=run",
        f"train.max_train_steps={STEPS}",
        "train.global_batch_size=12",
        "train.micro_batch_size=2",
        f"checkpoint.checkpointing_steps={EVERY}",
        "checkpoint.checkpoints_total_limit=1",
        f"checkpoint.resume={resume}",
        "optimizer.learning_rate=1e-3",
        f"parallel.tensor_model_parallel_size={layout.tensor}",
        f"parallel.pipeline_model_parallel_size={layout.pipeline}",
        f"parallel.pipeline_schedule={layout.schedule}",
        f"parallel.distributed_timeout_minutes={TIMEOUT_S / 60}",
    )
    world = {"WORLD_SIZE": str(layout.world), "LOCAL_WORLD_SIZE": str(layout.world)}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank, watch in enumerate(watches):
        environment = {**os.environ, **world, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = warm_context().Process(  # type: ignore[attr-defined]
            target=train_watched,
            args=(environment, arguments, output(run_dir, rank), watch),
        )
        process.start()
        processes.append(process)
    return processes


def output(run_dir: Path, rank: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}.out{rank}")


def exit_codes(processes: list[Any]) -> list[int | None]:
    """None: it had not ended after the limit."""
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def watches_of(run_dir: Path, layout: Layout) -> list[Watch]:
    notes = [run_dir.with_name(f"{run_dir.name}.notes{rank}") for rank in range(layout.world)]
    return [Watch(run_dir / "checkpoints", note) for note in notes]


def finish(tiny: Tiny, layout: Layout, run_dir: Path, resume: str) -> list[Watch]:
    """A run to its last step; what each rank noted."""
    watches = watches_of(run_dir, layout)
    codes = exit_codes(start(tiny, layout, run_dir, watches, resume))
    assert codes == [0] * layout.world, printed(run_dir, layout)
    return watches


def printed(run_dir: Path, layout: Layout) -> str:
    return "\n".join(output(run_dir, rank).read_text() for rank in range(layout.world))


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Unbroken]:
    folder = tmp_path_factory.mktemp("unbroken")

    @cache
    def made(layout: Layout) -> Unbroken:
        run_dir = folder / str(LAYOUTS.index(layout))
        watches = finish(tiny, layout, run_dir, "none")
        return Unbroken(run_dir, [watch.changes() for watch in watches])

    return made


def saves(changes: list[Change]) -> dict[int, dict[str, list[int]]]:
    """Step -> call -> numbers of the changes, from 1, in the save of that step.

    A save begins where a path first names its step; what it does to older checkpoints is part of
    it.
    """
    found: dict[int, dict[str, list[int]]] = {}
    step = EVERY
    for number, change in enumerate(changes, start=1):
        named = re.search(r"step-(\d+)", change.path)
        step = max(step, int(named[1]) if named else 0)
        found.setdefault(step, {}).setdefault(change.call, []).append(number)
    return found


def newest(run_dir: Path) -> int:
    """Step of the newest committed checkpoint; 0: there is none."""
    steps = [
        int(path.parent.name.removeprefix("step-"))
        for path in run_dir.glob("checkpoints/step-*/manifest.json")
        if re.fullmatch(r"step-\d+", path.parent.name)
    ]
    return max(steps, default=0)


def break_and_go_on(tiny: Tiny, schedule: Schedule, whole: Unbroken, run_dir: Path) -> None:
    layout, rank = schedule.a, schedule.rank
    watches = watches_of(run_dir, layout)
    where: dict[str, int] = {"step": schedule.step}
    if schedule.call is not None:
        numbers = saves(whole.changes[rank])[schedule.step][schedule.call]
        where = {"change": numbers[round(schedule.place * (len(numbers) - 1))]}
    watches[rank] = Watch(watches[rank].folder, watches[rank].notes, **where)
    codes = exit_codes(start(tiny, layout, run_dir, watches, "none"))

    last = watches[rank].changes()[-1]
    assert last.call == "died" and last.path.startswith(schedule.call or "in step"), last
    assert codes.pop(rank) == -signal.SIGKILL
    assert all(code is not None and code > 0 for code in codes), (codes, printed(run_dir, layout))

    # The last committed one is there until the next is; a save may be under way in a later step.
    found, before = newest(run_dir), (schedule.step - 1) // EVERY * EVERY
    next_one = before + EVERY if schedule.call else before - EVERY
    assert found in (before, max(next_one, 0)), last

    finish(tiny, schedule.b, run_dir, "latest")
    if found:
        again = f"resumed from {checkpoint(run_dir, found)} at step {found}"
        assert again in output(run_dir, 0).read_text()
    assert_as_unbroken(run_dir, whole.run_dir, same=schedule.a == schedule.b)


def learnt(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without those of saving and speed."""
    kinds = ("step", "train/", "optim/")
    return [{k: v for k, v in m.items() if k.startswith(kinds)} for m in metrics(run_dir)]


def assert_as_unbroken(run_dir: Path, whole: Path, same: bool) -> None:
    """The same bits where the layout is the same, else as near as layouts are to each other."""
    found, wanted = learnt(run_dir), learnt(whole)
    assert len(wanted) == STEPS
    if same:
        assert found == wanted
        assert_same_state(checkpoint(run_dir, STEPS), checkpoint(whole, STEPS))
        return
    for one, other in zip(found, wanted, strict=True):
        for name in COMPARED:
            right = pytest.approx(other[name], rel=RELATIVE, abs=0)
            assert one[name] == right, (other["step"], name)
    ours, theirs = state(checkpoint(run_dir, STEPS)), state(checkpoint(whole, STEPS))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= RELATIVE * tensor.norm(), name


# One of each kind: amid the first save's bytes, at the commit, in retention, in a step.
SOME = [
    Schedule(DATA, DATA, 2, 1, "write", 0.7),
    Schedule(DATA, ALONE, 4, 0, "rename", 0.5),
    Schedule(TENSOR, TENSOR, 4, 0, "unlink", 0.5),
    Schedule(TENSOR, DATA, 5, 1),
]


@pytest.mark.parametrize("schedule", SOME, ids=range(len(SOME)))
def test_some_schedules(
    schedule: Schedule, tiny: Tiny, unbroken: Callable[[Layout], Unbroken], tmp_path: Path
) -> None:
    break_and_go_on(tiny, schedule, unbroken(schedule.a), tmp_path / "run")


# Amid and at the end of retention: few of a save's changes, so that none may be drawn.
LATE = [Schedule(DATA, DATA, 4, 0, "rmdir", 0.0), Schedule(DATA, TENSOR, 6, 0, "rmdir", 1.0)]


@pytest.mark.full
@pytest.mark.parametrize("schedule", LATE, ids=range(len(LATE)))
def test_retention_schedules(
    schedule: Schedule, tiny: Tiny, unbroken: Callable[[Layout], Unbroken], tmp_path: Path
) -> None:
    break_and_go_on(tiny, schedule, unbroken(schedule.a), tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(60))
def test_drawn_schedules(
    seed: int, tiny: Tiny, unbroken: Callable[[Layout], Unbroken], tmp_path: Path
) -> None:
    """Each kind of change of the drawn save is as likely, however often it happens."""
    draw = random.Random(seed)
    a = draw.choice(LAYOUTS)
    b = draw.choice([a, *LAYOUTS])
    rank = draw.randrange(a.world)
    whole = unbroken(a)
    if draw.random() < 0.2:
        schedule = Schedule(a, b, draw.randint(1, STEPS), rank)
    else:
        step, calls = draw.choice(sorted(saves(whole.changes[rank]).items()))
        schedule = Schedule(a, b, step, rank, draw.choice(sorted(calls)), draw.random())
    print(schedule)
    break_and_go_on(tiny, schedule, whole, tmp_path / "run")
