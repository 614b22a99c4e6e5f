"""A sick step is skipped by all ranks alike; a sick run ends; files ask it to save or stop."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.training import health as health_module
from soar_mega.training.health import FEWEST, Health
from soar_mega.training.requests import SAVE_NOW, STOP_NOW
from soar_mega.training.saving import Saver
from soar_mega.training.step import Stepper
from tests.distributed.harness import run_ranks
from tests.poison import Poison, poisoned
from tests.runs import (
    REPOSITORY,
    Tiny,
    assert_same_state,
    checkpoint,
    command,
    killed_in_step,
    metrics,
    start,
    train,
    trainer_record,
)

POISONS: tuple[Poison, ...] = get_args(Poison)


def overrides(tiny: Tiny, *more: str) -> list[str]:
    return [f"data.shards={tiny.shards('few')}", "train.micro_batch_size=4", *more]


def saved_steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def skipped(run_dir: Path) -> list[float]:
    """In total, after each step."""
    return [line["health/skipped_steps"] for line in metrics(run_dir)]


@contextmanager
def after_step(touched: dict[str, int], folder: Path) -> Iterator[None]:
    """Somebody touches files (name -> step, from 1) while that step runs; rank 0 alone sees it."""
    original = Stepper.run

    def run(self: Stepper, step: int, *rest: Any) -> dict[str, float]:
        for name, when in touched.items():
            if step + 1 == when and self.mesh.rank == 0:
                (folder / name).touch()
        return original(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "run", run)
        yield


# --- Two processes.


def everything(stepper: Stepper) -> dict[str, Tensor]:
    """A copy of all that a step changes, on this rank."""
    return {
        "weights": stepper.parameters.flat.clone(),
        "master": stepper.parameters.master_shard.clone(),
        "ema": stepper.ema.shard.clone(),
        "exp_avg": stepper.optimizer.exp_avg.clone(),
        "exp_avg_sq": stepper.optimizer.exp_avg_sq.clone(),
        "updates": torch.tensor(stepper.optimizer.step),
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def four_steps(tiny: Tiny, folder: Path, objective: str, what: Poison, more: list[str]) -> Any:
    """Two good steps, one with poison on the last rank alone, a good one.

    Two, because after one update the EMA is the weights, and folding them in changes nothing.
    """
    run = start(tiny.config(objective, folder, *overrides(tiny, *more)))
    stepper, last_rank = run.stepper, run.mesh.rank == run.mesh.world_size - 1
    seen = []
    with poisoned(what, {3}, here=last_rank):
        for step in range(4):
            before = everything(stepper)
            values = stepper.run(step, run.feed.load(step))
            change = changed(before, everything(stepper))
            seen.append((values, change, run.health.problem, run.health.state()))
            if step == 1:  # as many accepted steps as a median needs
                state = run.health.state()
                state["accepted"] = {k: v[:1] * FEWEST for k, v in state["accepted"].items()}
                stepper.health = Health.from_state(state, run.config.train)
    run.feed.close()
    return seen


LAYOUTS = {
    "data": ("sft", []),
    "tensor": ("sft", ["parallel.tensor_model_parallel_size=2"]),
    "pipeline": ("soar", ["parallel.pipeline_model_parallel_size=2"]),
}


def work_on_two(tiny: Tiny, folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    done: dict[str, Any] = {}
    for layout, (objective, more) in LAYOUTS.items():
        for what in POISONS if layout == "data" else POISONS[::2]:
            name = f"{layout}, {what}"
            done[name] = four_steps(tiny, folder / name, objective, what, more)
    steps = ("train.max_train_steps=5", "checkpoint.checkpointing_steps=3")
    with poisoned("nan sample", {3}, here=rank == 1):
        train(tiny.config("sft", folder / "whole", *overrides(tiny, *steps)))
    asked = tiny.config("sft", folder / "asked", *overrides(tiny, "train.max_train_steps=5"))
    with after_step({SAVE_NOW: 1, STOP_NOW: 3}, folder / "asked"):
        train(asked)
    return done


@pytest.fixture(scope="module")
def on_two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("on_two")
    return folder, run_ranks(2, work_on_two, tiny, folder)


CASES = [f"data, {what}" for what in POISONS]
CASES += [f"{layout}, {what}" for layout in ("tensor", "pipeline") for what in POISONS[::2]]


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_skip_one_rank_s_bad_step(case: str, on_two: tuple[Path, list[Any]]) -> None:
    """Nothing changes in it, everything in the next one, which is not skipped."""
    results = [result[case] for result in on_two[1]]
    for steps in results:
        everything_there = ["weights", "master", "ema", "exp_avg", "exp_avg_sq", "updates"]
        for number, (values, change, problem, _) in enumerate(steps):
            assert values["optim/lr"] > 0
            assert change == ([] if number == 2 else everything_there), number
            assert (problem is None) == (number != 2), problem
    for one, other in zip(*results, strict=True):
        assert repr(one[0]) == repr(other[0]), "the same metrics on every rank"
        assert one[2:] == other[2:]
    values, _, problem, state = results[0][2]
    finite_loss = math.isfinite(values["train/loss"])
    assert finite_loss == (not case.endswith("nan sample"))
    if "nan" in case or "inf" in case:
        assert not math.isfinite(values["optim/grad_norm"])
        assert "train/loss is nan" in problem or problem == "optim/grad_norm is inf"
    else:
        assert "times the median" in problem and f"last {FEWEST} accepted" in problem
    assert (state["skipped_steps"], state["skipped_in_a_row"]) == (1, 1)


def test_a_run_over_a_bad_step(on_two: tuple[Path, list[Any]]) -> None:
    """It is counted, written as null, and the checkpoint due then is made one step later."""
    run_dir = on_two[0] / "whole"
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5]
    assert skipped(run_dir) == [0, 0, 1, 1, 1]
    lost = [line["train/loss"] is None for line in metrics(run_dir)]
    assert lost == [False, False, True, False, False]
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
    assert saved_steps(run_dir) == ["step-00000004", "step-00000005"]
    assert trainer_record(checkpoint(run_dir, 5))["optimizer_updates"] == 4


def test_save_and_stop_on_two(on_two: tuple[Path, list[Any]]) -> None:
    run_dir = on_two[0] / "asked"
    assert saved_steps(run_dir) == ["step-00000001", "step-00000003"]
    assert len(metrics(run_dir)) == 3
    assert not (run_dir / SAVE_NOW).exists() and not (run_dir / STOP_NOW).exists()


# --- One process, as the command.


def test_a_run_that_is_sick_ends(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the bound, with 93; no skipped step is saved, the last healthy checkpoint is named."""
    more = ("train.max_skipped_steps=2", "train.max_train_steps=20")
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny, *more))
    with poisoned("nan sample", range(3, 21)):
        assert command([*arguments, "checkpoint.checkpointing_steps=1"]) == 93
    shown = capsys.readouterr()
    assert "step 3 is skipped, number 1 in a row" in shown.out
    assert shown.err.startswith("error: step 5 is skipped, number 3 in a row")
    healthy = checkpoint(tmp_path, 2)
    for word in ("train.max_skipped_steps = 2", "train/loss is nan", f"checkpoint, {healthy}, "):
        assert word in shown.err
    for setting in ("optimizer.learning_rate (now ", "lr_warmup", "logging.sample_ids"):
        assert setting in shown.err
    assert saved_steps(tmp_path) == ["step-00000001", "step-00000002"]
    assert skipped(tmp_path) == [0, 0, 1, 2, 3]


def test_a_run_that_is_sick_from_the_start(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny, "train.max_skipped_steps=0"))
    with poisoned("inf gradient", [1]):
        assert command([*arguments, "train.max_train_steps=2"]) == 93
    error = capsys.readouterr().err
    assert "optim/grad_norm is inf" in error and "no checkpoint to go back to" in error
    assert saved_steps(tmp_path) == []


def test_the_real_command_on_two(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing is patched: a rate at which the first update breaks the weights."""
    more = ("optimizer.learning_rate=1e30", "optimizer.lr_warmup_steps=0")
    more += ("train.max_skipped_steps=1", "train.max_train_steps=9")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny, *more))
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "soar_mega.train", *arguments],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: step 3 is skipped, number 2 in a row") == 1, done.stderr
    assert "exitcode  : 93" in done.stderr
    assert skipped(tmp_path) == [0, 1, 2] and saved_steps(tmp_path) == []


def test_resumed_skips_as_unbroken(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spike comes when the resumed process alone has seen too few steps to know it for one."""
    monkeypatch.setattr(health_module, "FEWEST", 4)
    more = ("train.max_train_steps=8", "checkpoint.checkpointing_steps=4")
    runs = {name: tmp_path / name / "run" for name in ("unbroken", "broken")}
    arguments = {
        name: tiny.arguments("sft", run, *overrides(tiny, *more)) for name, run in runs.items()
    }
    with poisoned("nan sample", [3]), poisoned("huge gradient", [6]):
        assert command(arguments["unbroken"]) == 0
        with killed_in_step(5):
            command(arguments["broken"])
        assert command([*arguments["broken"], "checkpoint.resume=latest"]) == 0
    assert skipped(runs["unbroken"]) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert metrics(runs["broken"]) == metrics(runs["unbroken"])
    assert_same_state(checkpoint(runs["broken"], 8), checkpoint(runs["unbroken"], 8))


def test_the_end_comes_while_steps_are_skipped(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stop and the last step save all the same, and what comes after knows how it stood."""
    more = ("train.max_train_steps=5", "train.max_skipped_steps=2")
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny, *more))
    with poisoned("nan sample", [2, 3, 5]), after_step({SAVE_NOW: 2, STOP_NOW: 3}, tmp_path):
        assert command(arguments) == 93
    assert "a checkpoint is due and waits" in capsys.readouterr().out
    assert saved_steps(tmp_path) == ["step-00000003"]
    assert not list(tmp_path.glob("*-now"))
    recorded = trainer_record(checkpoint(tmp_path, 3))
    assert recorded["health"]["skipped_in_a_row"] == 2 and recorded["optimizer_updates"] == 1

    # The next skipped step would be one too many, and a checkpoint like this is not called healthy.
    with poisoned("nan sample", [4]):
        assert command([*arguments, "checkpoint.resume=latest"]) == 93
    error = capsys.readouterr().err
    assert "number 3 in a row" in error and "no checkpoint to go back to" in error

    with poisoned("nan sample", [5]):
        assert command([*arguments, "checkpoint.resume=latest"]) == 0
    assert saved_steps(tmp_path) == ["step-00000003", "step-00000005"]
    assert trainer_record(checkpoint(tmp_path, 5))["health"]["skipped_in_a_row"] == 1
    assert skipped(tmp_path) == [0, 1, 2, 2, 3]


def test_damaged_health_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny))
    with after_step({STOP_NOW: 1}, tmp_path):
        assert command(arguments) == 93
    record = trainer_record(checkpoint(tmp_path, 1)) | {"health": {"skipped_steps": 0}}
    monkeypatch.setattr("soar_mega.training.resuming.store.read_extra", lambda path: record)
    assert command([*arguments, "checkpoint.resume=latest"]) == 78
    error = capsys.readouterr().err
    assert f"error: checkpoint.resume = {checkpoint(tmp_path, 1)}: the recorded health" in error


# --- Files that ask.


def test_save_and_stop(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each at the end of its step; the run goes on from there as if nothing had been asked."""
    more = ("train.max_train_steps=4", "run.name=run")
    unbroken = tiny.arguments("sft", tmp_path / "unbroken", *overrides(tiny, *more))
    assert command(unbroken) == 0
    run_dir = tmp_path / "asked"
    arguments = tiny.arguments("sft", run_dir, *overrides(tiny, *more))
    capsys.readouterr()
    with after_step({SAVE_NOW: 1, STOP_NOW: 3}, run_dir):
        assert command(arguments) == 93
    shown = capsys.readouterr()
    assert f"checkpoint: {checkpoint(run_dir, 1)}" in shown.out
    assert "stopped after 3 of 4 steps" in shown.out and "error" not in shown.err
    assert saved_steps(run_dir) == ["step-00000001", "step-00000003"]
    assert not list(run_dir.glob("*-now"))

    assert command([*arguments, "checkpoint.resume=latest"]) == 0
    assert metrics(run_dir) == metrics(tmp_path / "unbroken")
    assert_same_state(checkpoint(run_dir, 4), checkpoint(tmp_path / "unbroken", 4))


def test_stop_before_the_first_step(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing new to save; once obeyed it is gone, so the next start trains."""
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny, "train.max_train_steps=1"))
    (tmp_path / STOP_NOW).touch()
    assert command(arguments) == 93
    assert "stopped after 0 of 1 steps" in capsys.readouterr().out
    assert (saved_steps(tmp_path), metrics(tmp_path)) == ([], [])
    assert command(arguments) == 0


def test_asked_in_the_last_step(tiny: Tiny, tmp_path: Path) -> None:
    """The run is complete: it was not stopped, and nothing is left to stop the next one."""
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny, "train.max_train_steps=2"))
    with after_step({SAVE_NOW: 2, STOP_NOW: 2}, tmp_path):
        assert command(arguments) == 0
    assert saved_steps(tmp_path) == ["step-00000002"]
    assert not list(tmp_path.glob("*-now"))


def test_the_file_stays_until_the_checkpoint_is_there(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that fails leaves the request for the next start."""

    def fail(*arguments: Any) -> None:
        assert (tmp_path / SAVE_NOW).exists()
        raise OSError("no space left")

    monkeypatch.setattr(Saver, "save", fail)
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny))
    with after_step({SAVE_NOW: 1}, tmp_path), pytest.raises(OSError, match="no space left"):
        command(arguments)
    assert (tmp_path / SAVE_NOW).exists()
