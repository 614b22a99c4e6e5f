"""What a user gets wrong is told before training starts: exit code 78 and one readable message.

A message names the setting, its value, the rule and the fix.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from soar_mega.training import trainer
from tests.runs import REPOSITORY, Tiny, assert_nothing_written, checkpoint, command, metrics

# What a test puts in the way: (folder of the test, tiny folder) -> the overrides of the command.
Fault = Callable[[Path, Tiny], list[str]]


def unknown_override(folder: Path, tiny: Tiny) -> list[str]:
    return ["train.max_train_step=3"]


def wrong_section(folder: Path, tiny: Tiny) -> list[str]:
    return ["train.learning_rate=3"]


def no_shards(folder: Path, tiny: Tiny) -> list[str]:
    return [f"data.shards={folder}/nothing-*.tar"]


def no_validation_shards(folder: Path, tiny: Tiny) -> list[str]:
    return ["validation.validation_steps=1", f"validation.shards={folder}/nothing-*.tar"]


def too_few_validation_samples(folder: Path, tiny: Tiny) -> list[str]:
    shards = f"validation.shards={tiny.shards('heldout')}"
    return ["validation.validation_steps=1", shards, "validation.num_samples=17"]


def no_captions(folder: Path, tiny: Tiny) -> list[str]:
    """The shards as they are, less the captions of one of them."""
    first, second = sorted((tiny.folder / "shards").glob("few-*.tar"))
    shutil.copy(first, folder / first.name)
    with tarfile.open(second) as source, tarfile.open(folder / second.name, "w") as target:
        for member in source.getmembers():
            file = source.extractfile(member)
            if file is not None and member.name.endswith(".png"):
                target.addfile(member, io.BytesIO(file.read()))
    return [f"data.shards={folder}/few-*.tar"]


def no_folder(folder: Path, tiny: Tiny) -> list[str]:
    return [f"model.pretrained={folder}/nowhere"]


def no_model(folder: Path, tiny: Tiny) -> list[str]:
    (folder / "sd35").mkdir()
    (folder / "sd35" / "config.json").write_text("{}")
    return [f"model.pretrained={folder}/sd35"]


def no_transformer_weights(folder: Path, tiny: Tiny) -> list[str]:
    shutil.copytree(tiny.pretrained, folder / "sd35")
    for file in (folder / "sd35" / "transformer").glob("*.safetensors"):
        file.unlink()
    return [f"model.pretrained={folder}/sd35"]


def no_checkpoint(folder: Path, tiny: Tiny) -> list[str]:
    return [f"checkpoint.resume={folder}/run/checkpoints/step-00000003"]


def no_checkpoint_in_a_folder(folder: Path, tiny: Tiny) -> list[str]:
    (folder / "empty").mkdir()
    return [f"checkpoint.resume={folder}/empty"]


def nothing_to_start_from(folder: Path, tiny: Tiny) -> list[str]:
    return [f"model.init_from={folder}/nowhere"]


def odd_global_batch(folder: Path, tiny: Tiny) -> list[str]:
    return ["train.global_batch_size=9"]


def resolution_the_model_cannot(folder: Path, tiny: Tiny) -> list[str]:
    return ["data.resolution=1024"]


def no_text_tokens(folder: Path, tiny: Tiny) -> list[str]:
    return ["data.max_sequence_length=0"]


FAULTS: list[tuple[Fault, list[str]]] = [
    (
        unknown_override,
        ["unknown key train.max_train_step ", "command line", "did you mean train.max_train_steps"],
    ),
    (wrong_section, ["unknown key train.learning_rate", "did you mean optimizer.learning_rate"]),
    (no_shards, ["data.shards", "nothing-*.tar", "no shard matches", "Correct the path"]),
    (no_validation_shards, ["validation.shards", "nothing-*.tar", "no shard matches"]),
    (too_few_validation_samples, ["validation.num_samples = 17", "16 samples", "lower it"]),
    (
        no_captions,
        ["data.shards", "few-000001.tar", "none of its 10 samples has a caption", "Add the"],
    ),
    (no_folder, ["model.pretrained", "nowhere", "no such folder", "Give a folder that"]),
    (no_model, ["model.pretrained", "model_index.json", "Give a folder that"]),
    (no_transformer_weights, ["sd35", "transformer", "safetensors"]),
    (no_checkpoint, ["checkpoint.resume", "step-00000003", "does not exist"]),
    (no_checkpoint_in_a_folder, ["checkpoint.resume", "empty", "no committed checkpoint"]),
    (nothing_to_start_from, ["nowhere", "does not exist"]),
    (odd_global_batch, ["train.global_batch_size = 9", "train.micro_batch_size = 2", "8 or 10"]),
    (
        resolution_the_model_cannot,
        ["data.resolution = 1024", "64 image tokens a side", "12 x 12", "use one of at most 192"],
    ),
    (no_text_tokens, ["data.max_sequence_length = 0", "greater than or equal to 1"]),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_refused(
    fault: Fault, words: list[str], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.arguments("sft", tmp_path / "run", *fault(tmp_path, tiny))
    assert command(arguments) == 78
    assert_told(capsys.readouterr().err, words)
    assert_nothing_written(tmp_path / "run")


def assert_told(message: str, words: list[str]) -> None:
    assert message.startswith("error: ") and "Traceback" not in message
    assert message.count("error: ") == 1
    for word in words:
        assert word in message, message


def test_unknown_key_in_a_file(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file that holds it is named, though another one inherits from it."""
    base = tmp_path / "base.yaml"
    base.write_text("train:\n  micro_batchsize: 2\n")
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: [{REPOSITORY}/configs/tiny_sft.yaml, base.yaml]\n")
    assert command([str(config), *tiny.arguments("sft", tmp_path / "run")[1:]]) == 78
    words = ["unknown key train.micro_batchsize", "base.yaml", "train.micro_batch_size"]
    assert_told(capsys.readouterr().err, words)


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([str(tmp_path / "gone.yaml")]) == 78
    assert_told(capsys.readouterr().err, ["gone.yaml"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (
            3,
            ["parallel.tensor_model_parallel_size=3"],
            ["parallel.tensor_model_parallel_size", "3", "4", "1, 2, 4"],
        ),
        (
            4,
            ["parallel.tensor_model_parallel_size=3"],
            ["parallel.tensor_model_parallel_size = 3", "number of processes", "4", "1, 2, 4"],
        ),
        (
            3,
            [],
            ["train.global_batch_size = 8", "train.micro_batch_size", "6 or 12"],
        ),
        (
            4,
            ["parallel.pipeline_model_parallel_size=3"],
            ["parallel.pipeline_model_parallel_size = 3", "which is 4", "1, 2, 4"],
        ),
        (
            8,
            ["parallel.pipeline_model_parallel_size=4", "train.micro_batch_size=1"],
            ["parallel.pipeline_model_parallel_size is 4", "3 layers", "at most 3"],
        ),
        (
            2,
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.pipeline_schedule=interleaved_1f1b",
            ],
            ["4 stages (2 virtual ones a rank)", "3 layers", "at most 1"],
        ),
        (
            2,
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.pipeline_schedule=zero_bubble",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
            ["virtual_pipeline_model_parallel_size = 2", "'zero_bubble'", "which takes 1"],
        ),
        (
            2,
            ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[2,2]"],
            ["parallel.pipeline_layout is [2, 2]", "its sum is 4", "[1, 2]"],
        ),
    ],
)
def test_number_of_processes(
    rank: int,
    world: int,
    overrides: list[str],
    words: list[str],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every rank refuses, rank 0 speaks for all. The other processes are not there."""
    monkeypatch.setattr(trainer, "start_processes", lambda *_: None)
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert command(tiny.arguments("sft", tmp_path / "run", *overrides)) == 78
    message = capsys.readouterr().err
    if rank == 0:
        assert_told(message, words)
    else:
        assert message == ""


def test_latest_with_nothing_there_starts_fresh(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job script says ``latest`` always, in its first job too."""
    arguments = tiny.arguments("sft", tmp_path, "train.max_train_steps=1")
    assert command([*arguments, "checkpoint.resume=latest"]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint.resume = latest" in shown and "starting fresh" in shown
    assert str(tmp_path / "checkpoints") in shown
    assert checkpoint(tmp_path, 1).is_dir()

    # And a fresh start would now bury that run.
    before = metrics(tmp_path)
    assert command(arguments) == 78
    words = [f"run.dir = {tmp_path}", "already holds checkpoints", "checkpoint.resume=latest"]
    assert_told(capsys.readouterr().err, words)
    assert metrics(tmp_path) == before


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (unknown_override, ["unknown key train.max_train_step "]),
        (no_shards, ["data.shards", "no shard matches"]),
    ],
)
def test_the_real_command(fault: Fault, words: list[str], tiny: Tiny, tmp_path: Path) -> None:
    arguments = tiny.arguments("sft", tmp_path / "run", *fault(tmp_path, tiny))
    done = subprocess.run(
        [sys.executable, "-m", "soar_mega.train", *arguments],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (78, "")
    assert_told(done.stderr[done.stderr.index("error: ") :], words)
