"""What a checkpoint folder may look like after a crash, a flipped bit, or a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.retention import Retention
from soar_mega.checkpoint.selection import select
from soar_mega.parallel.mesh import Mesh

MESH = Mesh.single()


def saved(root: Path, step: int, keep: int | None = None) -> Path:
    tensor = torch.full((64, 3), float(step))
    state = {"model.w": BoxedTensor.whole(tensor)}
    return store.save(root, step, state, {"step": step}, MESH, Retention(keep)).path


def load(path: Path) -> torch.Tensor:
    tensor = torch.zeros(64, 3)
    select(str(path), path.parent, MESH)
    store.load(path, {"model.w": BoxedTensor.whole(tensor)}, MESH)
    return tensor


def test_every_single_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"):
        whole = file.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=file.name.replace("+", r"\+")):
                load(path)
        file.write_bytes(whole)
    assert torch.equal(load(path), torch.full((64, 3), 1.0))


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", '{"files": []}', '{"files": {"a": {}}}', '{"files": {"a": {"size": "x"}}}'],
)
def test_damaged_manifests_are_named(tmp_path: Path, manifest: str) -> None:
    path = saved(tmp_path, 1)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(path)


def test_an_interrupted_replacement_is_put_back(tmp_path: Path) -> None:
    path = saved(tmp_path, 4)
    path.rename(path.with_name(path.name + ".replaced"))
    assert store.latest(tmp_path) is None
    assert select("latest", tmp_path, MESH).path == path
    assert torch.equal(load(path), torch.full((64, 3), 4.0))


def test_superseded_steps_do_not_count_as_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    renamed = store.set_aside_after(tmp_path, 1)
    assert [p.name for p in renamed] == ["step-00000002.superseded-1", "step-00000003.superseded-1"]
    assert [p.name for p in store.committed(tmp_path)] == ["step-00000001"]
    saved(tmp_path, 2)
    assert [p.name for p in store.set_aside_after(tmp_path, 1)] == ["step-00000002.superseded-2"]
    # Retention removes them once a checkpoint of their step, or a later one, is there.
    saved(tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.glob("*superseded*")] == ["step-00000003.superseded-1"]
    assert json.loads((renamed[1] / "trainer.json").read_text()) == {"step": 3}
    saved(tmp_path, 4, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
