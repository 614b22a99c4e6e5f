"""Checkpoints that somebody made up: nothing in them is run, nothing outside of them is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.hashing import hash_file
from soar_mega.checkpoint.manifest import write_manifest
from soar_mega.checkpoint.selection import select
from soar_mega.parallel.mesh import Mesh

MESH = Mesh.single()


class Canary:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def sign(path: Path) -> None:
    """Who plants a file mends the hashes."""
    files = {
        file.relative_to(path).as_posix(): (file.stat().st_size, hash_file(file, "xxh3-128"))
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    write_manifest(path, 1, files, "xxh3-128")


def take_up(path: Path) -> None:
    """All that reads a checkpoint."""
    found = select(str(path), path.parent, MESH).path
    assert found is not None
    store.read_extra(found)
    tensor = torch.zeros(64)
    store.load(found, {"w": BoxedTensor.whole(tensor)}, MESH)
    store.StateReader(found).read("w")
    assert torch.equal(tensor, torch.ones(64))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    state = {"w": BoxedTensor.whole(torch.ones(64))}
    path = store.save(tmp_path, 1, state, {"step": 1}, MESH).path
    take_up(path)
    return path


def pickles(canary: Path, folder: Path) -> dict[str, bytes]:
    """A canary in the ways in which torch and Python write pickles."""
    torch.save({"w": Canary(canary)}, folder / "archive")
    torch.save({"w": Canary(canary)}, folder / "legacy", _use_new_zipfile_serialization=False)
    return {
        "plain": pickle.dumps(Canary(canary)),
        "archive": (folder / "archive").read_bytes(),
        "legacy": (folder / "legacy").read_bytes(),
    }


@pytest.mark.parametrize("kind", ["plain", "archive", "legacy"])
@pytest.mark.parametrize(
    "file",
    [
        "trainer.json",
        "manifest.json",
        "state/index.json",
        "state/rank-00000.safetensors",
        # Where torch's own format keeps pickles.
        "state/.metadata",
        "state/__0_0.distcp",
        "optimizer.pt",
        "rng_state_0.pth",
        "random_states_0.pkl",
        "trainer.pkl",
    ],
)
def test_no_canary_is_ever_run(file: str, kind: str, whole: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = pickles(canary, tmp_path)[kind]
    known = (whole / file).exists()
    (whole / file).write_bytes(evil)
    if file != "manifest.json":
        sign(whole)
    if known and not file.endswith("safetensors"):
        with pytest.raises(CheckpointError):
            take_up(whole)
    elif known:  # its bytes are numbers, whatever they spell, or too few
        with pytest.raises((CheckpointError, AssertionError)):
            take_up(whole)
    else:
        take_up(whole)
    assert not canary.exists()
    pickle.loads(pickles(canary, tmp_path)["plain"])
    assert canary.exists()  # it would have sung


Change = Callable[[dict[str, Any]], Any]


def set_box(number: int, value: Any) -> Change:
    def change(index: dict[str, Any]) -> None:
        index["tensors"]["w"]["boxes"][0][number] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_box(2, "../../secret"),
        set_box(2, "/etc/passwd"),
        set_box(2, ""),
        set_box(2, 7),
        set_box(3, -8),
        set_box(3, 10**12),
        set_box(3, 1.5),
        set_box(0, [60]),
        set_box(0, [-1]),
        set_box(0, []),
        set_box(1, [65]),
        set_box(1, [True]),
        lambda index: index["tensors"]["w"].update(dtype="F128"),
        lambda index: index["tensors"]["w"].update(shape="64"),
        lambda index: index["tensors"]["w"].update(shape=[10**15]),
        lambda index: index["tensors"]["w"]["boxes"].append(1),
        lambda index: index.update(format=2),
        lambda index: index.update(tensors=[]),
        lambda index: index.pop("tensors"),
    ],
)
def test_an_index_that_leads_astray_is_refused(change: Change, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 4096)
    file = whole / "state" / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    sign(whole)
    with pytest.raises(CheckpointError):
        take_up(whole)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "state/../../secret"])
def test_a_manifest_does_not_lead_out_of_the_folder(name: str, whole: Path) -> None:
    files = json.loads((whole / "manifest.json").read_text())["files"]
    pairs = {n: (entry["size"], entry["hash"]) for n, entry in files.items()}
    write_manifest(whole, 1, {**pairs, name: (1, "0")}, "xxh3-128")
    with pytest.raises(CheckpointError, match="names files outside"):
        take_up(whole)


@pytest.mark.parametrize("text", ["", "[]", "7", '{"step": ', "\x00"])
def test_a_signed_record_that_is_none_is_refused(text: str, whole: Path) -> None:
    (whole / "trainer.json").write_text(text)
    sign(whole)
    with pytest.raises(CheckpointError, match=r"trainer\.json"):
        take_up(whole)
