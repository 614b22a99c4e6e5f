"""A run that stops and goes on is the same run; another layout goes on from the same weights."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from soar_mega.checkpoint import store
from soar_mega.checkpoint.hashing import hash_file
from soar_mega.checkpoint.manifest import read_manifest
from soar_mega.checkpoint.synced import write_json
from soar_mega.config import Config
from tests.distributed.harness import run_ranks
from tests.runs import (
    Tiny,
    assert_nothing_written,
    assert_same_state,
    assert_weights,
    checkpoint,
    command,
    copy_checkpoint,
    killed_in_step,
    losses,
    metrics,
    start,
    state,
    train,
    trainer_record,
)

STEPS, STOP = 6, 3


def overrides(tiny: Tiny) -> list[str]:
    """20 samples in batches of 8: epochs end within step 3, just before the stop, and with step 5.

    The cosine makes the learning rate depend on the step and the length of the run.
    """
    return [
        f"data.shards={tiny.shards('few')}",
        "run.name=run",
        f"train.max_train_steps={STEPS}",
        "train.micro_batch_size=4",
        f"checkpoint.checkpointing_steps={STOP}",
        "optimizer.lr_scheduler=cosine",
        "optimizer.lr_warmup_steps=2",
    ]


def assert_same_run(broken: Path, unbroken: Path) -> None:
    assert [line["step"] for line in metrics(unbroken)] == list(range(1, STEPS + 1))
    assert metrics(broken) == metrics(unbroken)
    for step in (STOP, STEPS):
        assert_same_state(checkpoint(broken, step), checkpoint(unbroken, step))
    records = [trainer_record(checkpoint(run, STEPS)) for run in (broken, unbroken)]
    assert records[0] == records[1]


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Objective -> a run of 6 steps without a stop."""
    folder = tmp_path_factory.mktemp("unbroken")
    runs = {}
    for objective in ("sft", "soar"):
        runs[objective] = folder / objective
        assert command(tiny.arguments(objective, runs[objective], *overrides(tiny))) == 0
    return runs


@pytest.mark.parametrize(
    ("objective", "cached", "how"),
    [
        ("sft", False, "latest"),
        ("sft", True, "path"),
        ("soar", False, "path"),
        ("soar", True, "latest"),
    ],
)
def test_resumed_equals_unbroken(
    objective: str,
    cached: bool,
    how: str,
    tiny: Tiny,
    tmp_path: Path,
    unbroken: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed in step 5: step 4 is done again, and its first line in the metrics is gone."""
    arguments = tiny.arguments(
        objective, tmp_path, *overrides(tiny), f"data.cache_encoded={str(cached).lower()}"
    )
    with killed_in_step(STOP + 2):
        command(arguments)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    stopped = checkpoint(tmp_path, STOP)
    assert store.latest(stopped.parent) == stopped

    value = "latest" if how == "latest" else str(stopped)
    assert command([*arguments, f"checkpoint.resume={value}"]) == 0
    assert f"resumed from {stopped} at step {STOP}" in capsys.readouterr().out
    assert_same_run(tmp_path, unbroken[objective])

    # Once more: every step is done.
    assert command([*arguments, "checkpoint.resume=latest"]) == 0
    assert f"nothing to do: {STEPS} of {STEPS} steps are done" in capsys.readouterr().out
    assert metrics(tmp_path) == metrics(unbroken[objective])


@dataclass(frozen=True)
class Layout:
    """A run on two processes."""

    objective: str
    tensor: int
    cached: bool
    micro: int = 4

    def config(self, tiny: Tiny, run_dir: Path, *more: str) -> Config:
        return tiny.config(
            self.objective,
            run_dir,
            *overrides(tiny),
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.sequence_parallel={str(self.tensor > 1).lower()}",
            f"data.cache_encoded={str(self.cached).lower()}",
            f"train.micro_batch_size={self.micro}",
            *more,
        )


def stop_and_resume(tiny: Tiny, folder: Path, layouts: list[Layout]) -> None:
    """For each layout a run without a stop in ``whole`` and one with in ``broken``."""
    for number, layout in enumerate(layouts):
        train(layout.config(tiny, folder / str(number) / "whole"))
        broken = folder / str(number) / "broken"
        with killed_in_step(STOP + 2):
            train(layout.config(tiny, broken))
        train(layout.config(tiny, broken, "checkpoint.resume=latest"))


def resume_and_save(config: Config, weights_of: Path) -> None:
    """Take up a checkpoint in a run folder of its own; what was loaded is saved at once."""
    run = start(config)
    assert (run.done_steps, run.stepper.optimizer.step) == (STOP, STOP)
    assert_weights(run, state(weights_of), "model")
    run.saver.save(STOP)
    run.saver.finish()
    run.feed.close()


def change_layout(tiny: Tiny, folder: Path) -> None:
    """Tensor parallel 2; from its step 3 data parallel 2."""
    train(Layout("soar", 2, False).config(tiny, folder / "tensor"))
    stopped = checkpoint(folder / "tensor", STOP)
    second = Layout("soar", 1, True, micro=2)
    run_dir = folder / "data"
    resume_and_save(second.config(tiny, run_dir, f"checkpoint.resume={stopped}"), stopped)
    train(second.config(tiny, run_dir, "checkpoint.resume=latest"))


def on_two(tiny: Tiny, folder: Path, layouts: list[Layout]) -> None:
    stop_and_resume(tiny, folder, layouts)
    change_layout(tiny, folder)


def assert_stopped_runs(folder: Path, layouts: list[Layout]) -> None:
    for number in range(len(layouts)):
        assert_same_run(folder / str(number) / "broken", folder / str(number) / "whole")


def test_two_processes(tiny: Tiny, tmp_path: Path) -> None:
    """Stop and resume in two layouts; from tensor to data parallel to one process."""
    layouts = [Layout("soar", 2, True), Layout("sft", 1, False)]
    run_ranks(2, on_two, tiny, tmp_path, layouts)
    assert_stopped_runs(tmp_path, layouts)

    # Weights, EMA and moments stay the same bits when they are cut in another way.
    stopped = checkpoint(tmp_path / "tensor", STOP)
    assert_same_state(checkpoint(tmp_path / "data", STOP), stopped)
    alone, more = tmp_path / "single", (*overrides(tiny), "train.micro_batch_size=8")
    resume = f"checkpoint.resume={checkpoint(tmp_path / 'data', STOP)}"
    resume_and_save(tiny.config("soar", alone, *more, resume), stopped)
    assert_same_state(checkpoint(alone, STOP), stopped)
    train(tiny.config("soar", alone, *more, "checkpoint.resume=latest"))
    for other in ("data", "single"):
        expected = losses(tmp_path / "tensor")[STOP:]
        assert losses(tmp_path / other) == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.full
def test_two_processes_every_kind(tiny: Tiny, tmp_path: Path) -> None:
    layouts = [
        Layout(objective, tensor, cached)
        for objective in ("sft", "soar")
        for tensor in (1, 2)
        for cached in (False, True)
    ]
    for part in (layouts[:4], layouts[4:]):
        run_ranks(2, stop_and_resume, tiny, tmp_path, part)
        assert_stopped_runs(tmp_path, part)
        for number in range(len(part)):
            shutil.rmtree(tmp_path / str(number))


def test_limit_and_names_that_are_no_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    """The newest two stay; folders of an interrupted save are not looked at."""
    arguments = tiny.arguments(
        "sft", tmp_path, "checkpoint.checkpointing_steps=1", "checkpoint.checkpoints_total_limit=2"
    )
    assert command([*arguments, "train.max_train_steps=4"]) == 0
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]

    shutil.copytree(checkpoint(tmp_path, 4), folder / "step-00000009.tmp")
    half = folder / "step-00000007"
    half.mkdir()
    (half / "trainer.json").write_text("{")
    assert command([*arguments, "train.max_train_steps=5", "checkpoint.resume=latest"]) == 0
    assert [path.name for path in store.committed(folder)] == ["step-00000004", "step-00000005"]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("weights", ["ema", "plain"])
@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_init_from_a_run(
    source: str, weights: str, tiny: Tiny, tmp_path: Path, unbroken: dict[str, Path]
) -> None:
    """A new run: step 0, fresh moments, these weights, and where they came from."""
    parent = unbroken["sft"]
    named = parent if source == "run" else checkpoint(parent, STOP)
    taken = checkpoint(parent, STEPS if source == "run" else STOP)
    config = tiny.config(
        "soar",
        tmp_path,
        f"model.init_from={named}",
        f"model.init_from_weights={weights}",
        "train.max_train_steps=1",
        "run.seed=3",
    )
    run = start(config)
    assert (run.done_steps, run.stepper.optimizer.step, run.resumed) == (0, 0, None)
    tensors = state(taken)
    kind, other = ("ema", "model") if weights == "ema" else ("model", "ema")
    assert_weights(run, tensors, kind)
    with pytest.raises(AssertionError):
        assert_weights(run, tensors, other)
    assert torch.equal(run.stepper.ema.shard, run.stepper.parameters.master_shard)
    assert not run.stepper.optimizer.exp_avg.any()
    run.feed.close()

    train(config)
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    parent = {
        "run": "run",
        "step": STEPS if source == "run" else STOP,
        "objective": "flow_matching",
        "weights": weights,
        "checkpoint": str(taken),
        "hash": store.identity(taken),
    }
    lineage = {
        "run": tmp_path.name,
        "step": 1,
        "objective": "soar",
        "parents": [parent, {"pretrained": str(tiny.pretrained)}],
    }
    assert trainer_record(checkpoint(tmp_path, 1))["lineage"] == lineage

    # Going on with it keeps the record.
    longer = tiny.config(
        "soar", tmp_path, "train.max_train_steps=2", "run.seed=3", "checkpoint.resume=latest"
    )
    train(longer)
    assert trainer_record(checkpoint(tmp_path, 2))["lineage"] == lineage | {"step": 2}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=4", ["run.seed was 0 and is now 4"]),
        ("train.global_batch_size=12", ["train.global_batch_size was 8 and is now 12"]),
        ("objective.name=soar", ["objective.name was 'flow_matching' and is now 'soar'"]),
        ("data.shards=TRAIN", ["data.shards was"]),
    ],
)
def test_another_run_is_refused(
    override: str,
    words: list[str],
    tiny: Tiny,
    tmp_path: Path,
    unbroken: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What decides the draws and the order of samples; the way out is named, nothing is touched."""
    source = checkpoint(unbroken["sft"], STOP)
    override = override.replace("TRAIN", tiny.shards("train"))
    resume = f"checkpoint.resume={source}"
    arguments = tiny.arguments("sft", tmp_path / "run", *overrides(tiny), resume, override)
    assert command(arguments) == 78
    message = capsys.readouterr().err
    for word in [f"error: checkpoint.resume = {source}: ", *words, "model.init_from"]:
        assert word in message
    assert_nothing_written(tmp_path / "run")


def test_another_run_s_checkpoint_is_refused_where_there_are_own_ones(
    tiny: Tiny, tmp_path: Path, unbroken: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The metrics and checkpoints of two runs would mix."""
    copy_checkpoint(checkpoint(unbroken["sft"], STEPS), tmp_path)
    source = checkpoint(unbroken["sft"], STOP)
    resume = f"checkpoint.resume={source}"
    assert command(tiny.arguments("sft", tmp_path, *overrides(tiny), resume)) == 78
    message = capsys.readouterr().err
    for word in (str(source), f"run.dir = {tmp_path}", "another run", "model.init_from"):
        assert word in message
    assert store.latest(tmp_path / "checkpoints") == checkpoint(tmp_path, STEPS)


def test_going_back_does_steps_again(tiny: Tiny, tmp_path: Path, unbroken: dict[str, Path]) -> None:
    """From an earlier checkpoint of the run itself: a later one is not taken for the newest."""
    for step in (STOP, STEPS):
        copy_checkpoint(checkpoint(unbroken["sft"], step), tmp_path)
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny))
    with killed_in_step(STOP + 1):
        command([*arguments, f"checkpoint.resume={checkpoint(tmp_path, STOP)}"])
    assert store.latest(tmp_path / "checkpoints") == checkpoint(tmp_path, STOP)
    assert command([*arguments, "checkpoint.resume=latest"]) == 0
    assert_same_state(checkpoint(tmp_path, STEPS), checkpoint(unbroken["sft"], STEPS))
    assert metrics(tmp_path) == metrics(unbroken["sft"])[STOP:]


def test_more_steps_and_another_rate_are_the_same_run(
    tiny: Tiny, tmp_path: Path, unbroken: dict[str, Path]
) -> None:
    """What a person changes on purpose between jobs is not refused."""
    copy_checkpoint(checkpoint(unbroken["sft"], STEPS), tmp_path)
    more = ("checkpoint.resume=latest", "train.max_train_steps=7", "optimizer.learning_rate=3e-4")
    assert command(tiny.arguments("sft", tmp_path, *overrides(tiny), *more)) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [7]


def test_a_damaged_newest_one_is_passed_over(
    tiny: Tiny, tmp_path: Path, unbroken: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its steps are done again from the one before; by its path it is refused."""
    for step in (STOP, STEPS):
        copy_checkpoint(checkpoint(unbroken["sft"], step), tmp_path)
    damaged = checkpoint(tmp_path, STEPS)
    file = damaged / "state" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny))
    assert command([*arguments, f"checkpoint.resume={damaged}"]) == 78
    assert "rank-00000.safetensors: another hash" in capsys.readouterr().err
    assert command([*arguments, "checkpoint.resume=latest"]) == 0
    shown = capsys.readouterr().out
    aside = damaged.with_name(f"{damaged.name}.damaged-1")
    for words in (
        f"passed over: checkpoint {damaged} is damaged",
        f"resumed from {checkpoint(tmp_path, STOP)} at step {STOP}",
        f"set aside, as its steps are done again: {aside}",
    ):
        assert words in shown
    assert_same_state(checkpoint(tmp_path, STEPS), checkpoint(unbroken["sft"], STEPS))


def test_latest_with_nothing_there(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that is logged, or an error where a fresh start is not wanted."""
    one = "train.max_train_steps=1"
    arguments = tiny.arguments("sft", tmp_path / "run", one, "checkpoint.resume=latest")
    assert command([*arguments, "checkpoint.allow_fresh=false"]) == 78
    message = capsys.readouterr().err
    assert "holds no checkpoint and checkpoint.allow_fresh is false" in message
    assert command(arguments) == 0
    assert "holds no checkpoint: starting fresh" in capsys.readouterr().out
    assert command([*arguments, "checkpoint.allow_fresh=false"]) == 0


@pytest.mark.parametrize("survived", [False, True])
def test_a_full_disk(
    survived: bool,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second of three saves fails: the run ends, or goes on to the third."""
    original = store.write_manifest

    def sometimes_full(folder: Path, step: int, *rest: Any) -> None:
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, step, *rest)

    monkeypatch.setattr(store, "write_manifest", sometimes_full)
    arguments = tiny.arguments(
        "sft",
        tmp_path,
        "train.max_train_steps=3",
        "checkpoint.checkpointing_steps=1",
        f"checkpoint.max_failed_saves={int(survived)}",
    )
    assert command(arguments) == (0 if survived else 1)
    shown = capsys.readouterr()
    text = shown.out if survived else shown.err
    assert "No space left on device" in text and "bytes are missing" in text
    steps = [path.name for path in store.committed(tmp_path / "checkpoints")]
    assert steps == ["step-00000001", *(["step-00000003"] if survived else [])]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("key", ["step", "optimizer_updates", "run", "data", "lineage"])
def test_a_record_that_lacks_something_is_refused(
    key: str,
    tiny: Tiny,
    tmp_path: Path,
    unbroken: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With hashes that agree, as of another version; a lost data position can be given up."""
    path = copy_checkpoint(checkpoint(unbroken["sft"], STOP), tmp_path)
    record = trainer_record(path)
    del record[key]
    write_json(path / "trainer.json", record)
    manifest = read_manifest(path)
    file = path / "trainer.json"
    entry = file.stat().st_size, hash_file(file, manifest.algorithm)
    files = {**manifest.files, "trainer.json": entry}
    store.write_manifest(path, STOP, files, manifest.algorithm)
    arguments = tiny.arguments("sft", tmp_path, *overrides(tiny), "checkpoint.resume=latest")
    assert command(arguments) == 78
    message = capsys.readouterr().err
    if key == "data":
        assert "checkpoint.reset_data = true" in message
        assert command([*arguments, "checkpoint.reset_data=true"]) == 0
    else:
        assert f"trainer.json does not say {key}" in message
