"""A signal, wherever it comes, ends a run at the next step with one checkpoint and code 75."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soar_mega.launch import exit_codes, watchdog
from soar_mega.launch.signals import LEAD_VARIABLE
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.telemetry.metrics import read_metrics
from soar_mega.training import trainer
from soar_mega.training.feed import Feed
from soar_mega.training.saving import Saver
from soar_mega.training.step import Stepper
from soar_mega.training.validation import Validation
from tests.distributed.harness import Commands, running_commands
from tests.runs import Tiny, assert_same_state, checkpoint

STEPS = 3
# What is called where, and how many steps are done when the run that was signalled there has ended.
POINTS: dict[str, tuple[Any, str, int]] = {
    "start": (trainer, "build", 0),
    "step": (Stepper, "run", 1),
    "update": (ShardedParameters, "add_gradients", 1),
    "save": (Saver, "save", 2),
    "validation": (Validation, "losses", 1),
}


def overrides(tiny: Tiny) -> list[str]:
    return [
        "parallel.tensor_model_parallel_size=2",
        f"train.max_train_steps={STEPS}",
        "checkpoint.checkpointing_steps=1",
        "checkpoint.checkpoints_total_limit=null",
        "checkpoint.resume=latest",
        "validation.validation_steps=1",
        "validation.num_samples=4",
        "validation.num_timesteps=2",
        f"validation.shards={tiny.shards('heldout')}",
    ]


def signal_at(rank: int, point: str, at_rank: int, name: str, times: int, call: int) -> None:
    """This process signals itself in the ``call``-th call of the point's function."""
    owner, function, _ = POINTS[point]
    original, calls = getattr(owner, function), [0]

    def signalling(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if rank == at_rank and calls[0] == call:
            for _ in range(times):
                os.kill(os.getpid(), signal.Signals[name])
        return original(*arguments, **more)

    setattr(owner, function, signalling)


def nothing(rank: int) -> None:
    pass


def run(
    tiny: Tiny, folder: Path, prepare: Callable[..., None] = nothing, *more: Any
) -> tuple[list[int | None], Commands]:
    arguments = tiny.arguments("pretrain", folder / "run", *overrides(tiny))
    with running_commands(2, folder / "output", arguments, prepare, *more) as commands:
        return commands.wait(), commands


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    codes, commands = run(tiny, folder)
    assert codes == [0, 0], commands.errors(0)
    return folder / "run"


@pytest.mark.parametrize(
    ("point", "rank", "name", "times", "call"),
    [
        ("start", 0, "SIGUSR1", 1, 1),
        ("step", 1, "SIGUSR1", 2, 1),
        ("save", 1, "SIGTERM", 1, 1),
        ("validation", 0, "SIGINT", 1, 1),
        ("step", 0, "SIGUSR2", 1, STEPS),
    ],
)
def test_one_save_at_the_next_step_and_on_from_there(
    point: str,
    rank: int,
    name: str,
    times: int,
    call: int,
    unbroken: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(exit_codes.FILE_VARIABLE, str(tmp_path / "code"))
    codes, commands = run(tiny, tmp_path, signal_at, point, rank, name, times, call)
    done = STEPS if call == STEPS else POINTS[point][2]
    expected = exit_codes.DONE if done == STEPS else exit_codes.REQUEUE
    assert codes == [expected] * 2, commands.errors(0)
    assert (tmp_path / "code").read_text() == f"{expected}\n"
    shown = commands.shown()
    assert (f"stopped after {done} of {STEPS} steps, because a signal" in shown) == (done < STEPS)
    folder = tmp_path / "run" / "checkpoints"
    saved = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    assert saved == [f"step-{step:08d}" for step in range(1, done + 1)]
    assert not (tmp_path / "run" / "starts.json").exists()

    codes, commands = run(tiny, tmp_path)
    assert codes == [0, 0], commands.errors(0)
    assert_same_state(checkpoint(tmp_path / "run", STEPS), checkpoint(unbroken, STEPS))
    losses = [
        [(line["step"], line["train/loss"], line["val/loss"]) for line in read_metrics(path)]
        for path in (tmp_path / "run", unbroken)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def too_slow(rank: int) -> None:
    os.environ[LEAD_VARIABLE] = "0.0001"


def test_a_lead_that_is_too_short_is_told_once(tiny: Tiny, tmp_path: Path) -> None:
    codes, commands = run(tiny, tmp_path, too_slow)
    assert codes == [0, 0]
    assert commands.shown().count("use sbatch --signal=USR1@") == 1


def crash(rank: int) -> None:
    def crashing(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Stepper.run = crashing


def test_a_run_that_crashes_from_the_same_step_is_not_started_for_ever(
    tiny: Tiny, tmp_path: Path
) -> None:
    for _ in range(3):
        assert run(tiny, tmp_path, crash)[0] == [-signal.SIGKILL] * 2
    codes, commands = run(tiny, tmp_path)
    assert codes == [exit_codes.DO_NOT_RESTART] * 2
    assert "crashed 3 times in a row without getting past step 0" in commands.errors(0)
    (tmp_path / "run" / "starts.json").unlink()
    assert run(tiny, tmp_path)[0] == [0, 0]


def sleep_in_loader(rank: int, at_rank: int) -> None:
    original = Feed.load

    def sleepy_load(self: Feed, step: int) -> Any:
        if rank == at_rank and step == 1:
            hang()
        return original(self, step)

    watchdog.GRACE_S = 3.0
    Feed.load = sleepy_load  # type: ignore[method-assign]


def hang() -> None:
    time.sleep(600)


def stop_in_step(rank: int, at_rank: int) -> None:
    original = Stepper.run

    def stopping(self: Stepper, step: int, *rest: Any) -> dict[str, float]:
        if rank == at_rank and step == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, step, *rest)

    watchdog.GRACE_S = 3.0
    Stepper.run = stopping  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("prepare", "hanging", "writes"),
    [(sleep_in_loader, 1, [0, 1]), (sleep_in_loader, 0, [0, 1]), (stop_in_step, 1, [0])],
)
def test_a_hung_rank_ends_the_run_with_everybodys_stacks(
    prepare: Callable[..., None],
    hanging: int,
    writes: list[int],
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    """A stopped process can write nothing; the others' stacks tell where they wait for it."""
    arguments = tiny.arguments(
        "pretrain", tmp_path / "run", *overrides(tiny), "watchdog.step_minutes=0.1"
    )
    with running_commands(2, tmp_path / "output", arguments, prepare, hanging) as commands:
        others = [rank for rank in range(2) if rank in writes]
        for rank in others:
            commands.processes[rank].join(60)
            assert commands.processes[rank].exitcode == exit_codes.FAILED
        if len(others) == 1:
            assert commands.processes[hanging].exitcode is None
    stacks = tmp_path / "run" / "stacks"
    assert [int(path.stem[5:]) for path in sorted(stacks.iterdir())] == writes
    for rank in writes:
        text = (stacks / f"rank-{rank:05d}.txt").read_text()
        assert ("in hang\n" in text) == (rank == hanging and prepare is sleep_in_loader)
        assert "watchdog.step_minutes = 0.1" in commands.errors(rank)
