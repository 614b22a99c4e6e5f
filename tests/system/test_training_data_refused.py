"""What two processes must refuse together: a position that is damaged, and data that differ.

A single process that only some refuse would leave the others waiting in the middle of a step.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from soar_mega.checkpoint.hashing import hash_file
from soar_mega.checkpoint.manifest import read_manifest, write_manifest
from soar_mega.config import Config
from soar_mega.training.feed import Feed
from tests.distributed.harness import run_ranks
from tests.runs import Tiny, assert_nothing_written, checkpoint, copy_checkpoint, train
from tests.training_data import (
    keys_of,
    plain_cases,
    refusal_at_start,
    write_cases,
)

Record = dict[str, Any]


def without_data(record: Record) -> None:
    del record["data"]


def no_order(record: Record) -> None:
    record["data"] = {"samples": record["data"]["samples"]}


def half_a_draw(record: Record) -> None:
    record["data"]["order"]["waiting"] = [[0]]


def of_two_sources(record: Record) -> None:
    record["data"]["order"]["draws"].append(0)


def of_another_step(record: Record) -> None:
    """Well formed; samples would be drawn again."""
    record["data"]["order"]["draws"] = [0]


def never_counted(record: Record) -> None:
    record["data"]["samples"]["seen"] = float("inf")


DAMAGES: list[Callable[[Record], None]] = [
    without_data,
    no_order,
    half_a_draw,
    of_two_sources,
    of_another_step,
    never_counted,
]


def overrides(folder: Path) -> list[str]:
    return [
        f"data.shards={folder}/set/*.tar",
        "logging.sample_ids=true",
        "train.max_train_steps=2",
        "checkpoint.checkpointing_steps=1",
    ]


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``set/*.tar``, ``other/set/*.tar`` (other keys), and ``run``: of two steps."""
    root = tmp_path_factory.mktemp("refused")
    write_cases(root / "set" / "0.tar", plain_cases(20))
    write_cases(root / "other" / "set" / "0.tar", plain_cases(20, 5))
    train(tiny.config("pretrain", root / "run", *overrides(root)))
    for damage in DAMAGES:
        path = copy_checkpoint(checkpoint(root / "run", 1), root / damage.__name__)
        record = json.loads((path / "trainer.json").read_text())
        damage(record)
        rewrite(path, json.dumps(record).encode())
    path = copy_checkpoint(checkpoint(root / "run", 1), root / "cut")
    os.truncate(path / "trainer.json", 200)
    return root


def rewrite(path: Path, data: bytes) -> None:
    """Another ``trainer.json``, as somebody who knows of the manifest would put it there."""
    (path / "trainer.json").write_bytes(data)
    files = dict(read_manifest(path).files)
    files["trainer.json"] = (len(data), hash_file(path / "trainer.json", "xxh3-128"))
    write_manifest(path, 1, files, "xxh3-128")


def differing(tiny: Tiny, folder: Path, rank: int) -> dict[str, tuple[Config, Path]]:
    """Configuration and working folder of a rank, by what differs."""
    own = folder if rank == 0 else folder / "other"
    steps = f"train.max_train_steps={2 + rank}"
    relative = "data.shards=set/*.tar"  # the same words, another folder on each machine
    missing = f"data.shards={folder / 'set' if rank == 0 else '/nowhere'}/*.tar"
    runs = folder / "differing"
    return {
        "data": (tiny.config("pretrain", runs, *overrides(folder), relative), own),
        "configuration": (tiny.config("pretrain", runs, *overrides(folder), steps), folder),
        "missing": (tiny.config("pretrain", runs, *overrides(folder), missing), folder),
    }


def on_two(tiny: Tiny, folder: Path) -> dict[str, str]:
    resume = "checkpoint.resume=latest"
    with pytest.MonkeyPatch.context() as patch:

        def never(*_: object) -> None:
            raise AssertionError("a step began")

        patch.setattr(Feed, "load", never)
        messages = {
            name: refusal_at_start(
                tiny.config("pretrain", folder / name, *overrides(folder), resume)
            )
            for name in [*(damage.__name__ for damage in DAMAGES), "cut"]
        }
        for name, (config, working) in differing(tiny, folder, dist.get_rank()).items():
            patch.chdir(working)
            messages[name] = refusal_at_start(config)
    more = (resume, "checkpoint.reset_data=true")
    train(tiny.config("pretrain", folder / "without_data", *overrides(folder), *more))
    return messages


@pytest.fixture(scope="module")
def messages(tiny: Tiny, folder: Path) -> dict[str, str]:
    """What each refusal said, on both ranks alike."""
    ranks = run_ranks(2, on_two, tiny, folder)
    assert ranks[0] == ranks[1]
    found: dict[str, str] = ranks[0]
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("without_data", "'order'"),
        ("no_order", "'order'"),
        ("half_a_draw", r"position is damaged: .*\[\[0\]\]"),
        ("of_two_sources", "of 2 sources; there are 1"),
        ("of_another_step", "after 0 samples, and 8 were counted"),
        ("never_counted", "count of samples is damaged"),
    ],
)
def test_a_damaged_position(name: str, words: str, messages: dict[str, str]) -> None:
    found = messages[name]
    assert found.startswith("checkpoint.resume: the checkpoint does not say where the data stood")
    assert re.search(words, found), found
    assert "checkpoint.reset_data = true" in found


def test_a_file_cut_short(messages: dict[str, str]) -> None:
    assert re.search(r"is damaged:.*trainer\.json: 200 bytes instead of", messages["cut"], re.S)


def test_reset_data_begins_the_order_anew(messages: dict[str, str], folder: Path) -> None:
    whole = keys_of(folder / "run")
    assert keys_of(folder / "without_data") == {2: whole[1]} and whole[1] != whole[2]


def test_ranks_that_differ(messages: dict[str, str], folder: Path) -> None:
    """On every rank, before the first step; nothing of a run is written."""
    assert messages["data"].startswith(
        "the samples of data.shards or data.sources on rank 1 differs from that on rank 0"
    )
    assert messages["configuration"].startswith("the configuration on rank 1 differs")
    for name in ("data", "configuration"):
        assert "Give all processes the same files and arguments" in messages[name]
    assert messages["missing"].startswith("on rank 1: data.shards='/nowhere/*.tar'")
    assert_nothing_written(folder / "differing")
