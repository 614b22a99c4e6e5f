"""Committing, finding and resharding checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash

from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.retention import Retention
from soar_mega.checkpoint.selection import select
from soar_mega.checkpoint.torch_arrays import as_tensor
from soar_mega.parallel.layout import ParameterLayout, local_slice, real_part
from soar_mega.parallel.mesh import Mesh
from tests.distributed.harness import run_ranks

LAYOUTS = {
    "qkv": ParameterLayout((3, 12, 5), 1, "sharded"),
    "out": ParameterLayout((7, 12), 1, "sharded"),
    "up": ParameterLayout((24, 5), 0, "sharded"),
    # Five heads of 5, which neither 2 nor 3 divides.
    "padded_qkv": ParameterLayout((3, 25, 5), 1, "sharded", block=5),
    "padded_out": ParameterLayout((7, 25), 1, "sharded", block=5),
    "norm": ParameterLayout((6,), None, "partial"),
    "scale": ParameterLayout((), None),
}


def whole(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(LAYOUTS[name].global_shape, generator=generator)


def share(mesh: Mesh, fill: bool) -> dict[str, BoxedTensor]:
    """What a data-parallel rank owns: a flat range, cut at odd places, of each local parameter."""
    pieces = {}
    for name, layout in LAYOUTS.items():
        local = torch.zeros(layout.local_shape(mesh.tensor_size)).view(-1)
        real_part(local, layout, mesh).copy_(whole(name)[local_slice(layout, mesh)])
        cuts = [local.numel() * d // mesh.data_size for d in range(mesh.data_size + 1)]
        start, stop = cuts[mesh.data_rank], cuts[mesh.data_rank + 1]
        if start < stop:
            data = local[start:stop].clone() if fill else torch.full((stop - start,), torch.nan)
            pieces[name] = BoxedTensor.from_range(layout, mesh, start, stop, data)
    return pieces


def assert_equal(mine: dict[str, BoxedTensor], expected: dict[str, BoxedTensor]) -> None:
    assert mine.keys() == expected.keys()
    for name, tensor in mine.items():
        for box, reference in zip(tensor.boxes, expected[name].boxes, strict=True):
            assert torch.equal(box.data, reference.data), name


def save_as(mesh: Mesh, root: str) -> None:
    path = store.save(root, 3, share(mesh, True), {"step": 3, "loss": 0.1}, mesh).path
    assert path == select("latest", root, mesh).path


def load_as(mesh: Mesh, root: str) -> None:
    path = select("latest", root, mesh).path
    assert path is not None
    mine = share(mesh, False)
    assert store.load(path, mine, mesh) == {"step": 3, "loss": 0.1}
    assert_equal(mine, share(mesh, True))


def fail_as(mesh: Mesh, root: str) -> None:
    """Rank 0 alone knows that the path is wrong; every rank must fail with its words."""
    with pytest.raises(CheckpointError, match="no-such-folder does not exist"):
        select(f"{root}/no-such-folder", root, mesh)
    not_json = {"step": object()} if mesh.rank == 0 else {}
    with pytest.raises(CheckpointError, match="plain JSON"):
        store.save(root, 9, share(mesh, True), not_json, mesh)
    # One rank's tensor does not fit: all refuse, none hangs.
    wrong = share(mesh, False)
    if mesh.rank == 1:
        wrong["absent"] = BoxedTensor.whole(torch.zeros(2))
    with pytest.raises(CheckpointError, match="absent"):
        store.load(f"{root}/step-00000003", wrong, mesh)
    # Nobody writes a part of a tensor: not committed.
    holed = {name: piece for name, piece in share(mesh, True).items() if mesh.rank or name != "up"}
    with pytest.raises(CheckpointError, match="up"):
        store.save(root, 10, holed, {}, mesh)
    assert store.latest(root) == Path(root) / "step-00000003"


def run_jobs(jobs: list[tuple[str, int]], root: str) -> bool:
    """Several jobs in one set of processes: starting processes is what takes the time here."""
    for job, tensor_size in jobs:
        # Saves lie apart; loads and failures work on what tensor size 2 saved.
        folder = f"tensor-{tensor_size}" if job == "save_as" else "tensor-2"
        {"save_as": save_as, "load_as": load_as, "fail_as": fail_as}[job](
            Mesh.build(tensor_size), f"{root}/{folder}"
        )
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tensors saved by two processes as tensor 2 x data 1 and as tensor 1 x data 2."""
    root = tmp_path_factory.mktemp("saved")
    jobs = [("save_as", 2), ("save_as", 1), ("fail_as", 2)]
    assert run_ranks(2, run_jobs, jobs, str(root)) == [True, True]
    return root


def test_one_process_reads_what_two_wrote(saved: Path) -> None:
    for layout in ("tensor-1", "tensor-2"):
        load_as(Mesh.single(), str(saved / layout))
        reader = store.StateReader(store.find(saved / layout))
        assert reader.shapes == {n: layout.global_shape for n, layout in LAYOUTS.items()}
        for name in LAYOUTS:
            assert torch.equal(as_tensor(reader.read(name)), whole(name))


def test_three_processes_read_what_two_wrote(saved: Path) -> None:
    jobs = [("load_as", 1), ("load_as", 3)]
    assert run_ranks(3, run_jobs, jobs, str(saved)) == [True] * 3


def test_a_strided_piece_is_stored_without_what_lies_between(tmp_path: Path) -> None:
    padded = torch.randn(1000, 64)
    path = store.save(tmp_path, 1, {"w": BoxedTensor.whole(padded[:, :8])}, {}, Mesh.single()).path
    assert torch.equal(as_tensor(store.StateReader(path).read("w")), padded[:, :8])
    stored = sum(file.stat().st_size for file in (path / "state").iterdir())
    assert stored < 2 * 1000 * 8 * 4


def test_manifest_lists_every_file_with_size_and_hash(saved: Path) -> None:
    path = store.find(saved / "tensor-2")
    files = json.loads((path / "manifest.json").read_text())["files"]
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(files) == found - {"manifest.json"}
    for name, entry in files.items():
        content = (path / name).read_bytes()
        assert len(content) == entry["size"]
        assert xxhash.xxh3_128(content).hexdigest() == entry["hash"]


def save_alone(root: Path, step: int, keep: int | None = None, value: float = 0.0) -> Path:
    tensors = {"w": BoxedTensor.whole(torch.full((4,), value))}
    return store.save(root, step, tensors, {"step": step}, Mesh.single(), Retention(keep)).path


def test_latest_counts_committed_checkpoints_only(tmp_path: Path) -> None:
    assert store.latest(tmp_path / "absent") is None
    assert select("latest", tmp_path, Mesh.single()).path is None
    assert select("none", tmp_path, Mesh.single()).path is None
    for step in (9, 10):
        save_alone(tmp_path, step)
    (tmp_path / "step-00000011.tmp").mkdir()
    (tmp_path / "step-00000011.tmp" / "manifest.json").write_text("{}")
    (tmp_path / "step-00000012").mkdir()
    (tmp_path / "notes").mkdir()
    assert store.latest(tmp_path) == tmp_path / "step-00000010"
    assert store.find(tmp_path) == tmp_path / "step-00000010"


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_alone(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    save_alone(tmp_path, 4, keep=0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_saving_a_step_again_replaces_it_and_an_interrupted_one(tmp_path: Path) -> None:
    save_alone(tmp_path, 1)
    (tmp_path / "step-00000001.tmp" / "state").mkdir(parents=True)
    path = save_alone(tmp_path, 1, value=5.0)
    assert torch.equal(as_tensor(store.StateReader(path).read("w")), torch.full((4,), 5.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_explicit_path_must_be_a_whole_checkpoint(tmp_path: Path) -> None:
    mesh = Mesh.single()
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume = .*absent does not exist"):
        select(str(tmp_path / "absent"), tmp_path, mesh)
    path = save_alone(tmp_path / "checkpoints", 1)
    with pytest.raises(CheckpointError, match=r"did you mean .*step-00000001"):
        select(str(tmp_path), tmp_path, mesh)
    data = next((path / "state").glob("rank-*"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"safetensors: \d+ bytes instead of"):
        select(str(path), tmp_path, mesh)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        select(str(path), tmp_path, mesh)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    wanted = {name: BoxedTensor.whole(torch.zeros(3)) for name in ("w", "a", "b")}
    with pytest.raises(CheckpointError) as error:
        store.load(path, wanted, Mesh.single())
    assert "missing tensors (2):\n    a\n    b" in str(error.value)
    assert "w: (4,) stored, (3,) wanted" in str(error.value)
