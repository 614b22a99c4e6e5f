"""What happens when disks, machines and people do their worst to checkpoints."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soar_mega.checkpoint import folders, manifest, retention, selection, state_files, store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError, DiskFullError
from soar_mega.checkpoint.retention import Retention
from soar_mega.checkpoint.selection import select, select_source
from soar_mega.parallel.mesh import Mesh
from tests.distributed.harness import run_ranks

MESH = Mesh.single()
FILES = ("manifest.json", "trainer.json", "state/index.json", "state/rank-00000.safetensors")


def saved(root: Path, step: int, rule: Retention | None = None, **extra: Any) -> Path:
    state = {"model.w": BoxedTensor.whole(torch.full((64, 3), float(step)))}
    return store.save(root, step, state, {"step": step, **extra}, MESH, rule).path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def steps(root: Path) -> list[int]:
    return [folders.step_of(path) for path in store.committed(root)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        saved(root, step)
    return root


def flip(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    file=st.sampled_from(FILES),
    place=st.integers(0, 10**6),
    how=st.sampled_from(["flip", "cut", "empty", "zeros", "gone", "longer"]),
)
def test_a_damaged_newest_one_is_passed_over_and_named(
    two: Path, tmp_path_factory: pytest.TempPathFactory, file: str, place: int, how: str
) -> None:
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(two, root, dirs_exist_ok=True)
    good, bad = root / "step-00000001", root / "step-00000002"
    content = (bad / file).read_bytes()
    change: dict[str, Callable[[], bytes]] = {
        "flip": lambda: flip(content, place),
        "cut": lambda: content[: place % len(content)],
        "empty": lambda: b"",
        "zeros": lambda: bytes(len(content)),
        "longer": lambda: content + b" ",
    }
    if how == "gone":
        (bad / file).unlink()
    else:
        (bad / file).write_bytes(change[how]())
    found = select("latest", root, MESH)
    if file == "manifest.json" and how in ("flip", "longer") and found.path == bad:
        # White space, or the name of a key that nothing reads: all files are as they were.
        assert store.verify(bad) == []
        return
    assert found.path == good
    # Without a manifest a folder is no checkpoint: not damaged, but one of an interrupted save.
    if (file, how) == ("manifest.json", "gone"):
        assert found.ignored == [bad.name]
        return
    assert list(found.damaged) == [bad]
    assert Path(file).name in found.damaged[bad]
    with pytest.raises(CheckpointError, match="damaged"):
        select(str(bad), root, MESH)
    with pytest.raises(CheckpointError, match="Name another checkpoint"):
        select_source(root, MESH)
    renamed = store.set_aside_after(root, 1, found.damaged)
    assert [path.name for path in renamed] == ["step-00000002.damaged-1"]


def test_no_whole_one_is_an_error_and_not_a_fresh_start(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for path in store.committed(tmp_path):
        (path / "trainer.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as error:
        select("latest", tmp_path, MESH)
    for name in ("step-00000001", "step-00000002", "trainer.json: missing", "another run.dir"):
        assert name in str(error.value)


@pytest.mark.parametrize("last", ["write_manifest", "write_index", "write_json", "replace"])
def test_an_error_at_any_last_file_leaves_the_old_one(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    place: Any = {"write_index": "soar_mega.checkpoint.dcp"}.get(last, "soar_mega.checkpoint.store")
    with monkeypatch.context() as patch:
        patch.setattr(f"{place}.{last}", broken)
        with pytest.raises(CheckpointError, match="Input/output error"):
            saved(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert select("latest", tmp_path, MESH).path == tmp_path / "step-00000001"
    saved(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_writing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    put = state_files.DataFile._put

    def full(self: state_files.DataFile, data: memoryview) -> None:
        if len(data) < 768:  # the header
            put(self, data)
            return
        put(self, data[:500])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(state_files.DataFile, "_put", full)
        with pytest.raises(DiskFullError) as error:
            saved(tmp_path, 2)
    message = str(error.value)
    assert "step 2 needs 768 bytes" in message and "bytes are missing" in message
    assert os.strerror(code) in message and "untouched" in message
    assert names(tmp_path) == ["step-00000001"]


def test_a_disk_without_room_is_told_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=500)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DiskFullError, match=f"{768 + 2**20 - 500:,} bytes are missing"):
            saved(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(step: int) -> None:
        state = {"w": BoxedTensor.whole(torch.full((2**20,), float(step)))}
        store.save(small_disk, step, state, {"step": step}, MESH)

    save(1)
    with pytest.raises(DiskFullError, match="are free"):
        save(2)
    # And where the look before lies, as it does with quotas:
    usage = shutil.disk_usage(small_disk)._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match=r"No space left on device.*\n.*bytes are missing"):
        save(2)
    assert names(small_disk) == ["step-00000001"]
    assert store.verify(small_disk / "step-00000001") == []


def test_retention_rules_add_up(tmp_path: Path) -> None:
    rule = Retention(last=2, every=4, best=True)
    losses = {1: 0.9, 2: 0.5, 3: None, 4: 0.8, 5: float("nan"), 6: 0.5, 7: 0.7, 8: 0.9, 9: None}
    for step, loss in losses.items():
        saved(tmp_path, step, rule, validation_loss=loss)
    assert steps(tmp_path) == [4, 6, 8, 9]  # of equally good ones the newer


def test_the_last_healthy_one_stays(tmp_path: Path) -> None:
    for step, row in ((1, 0), (2, 0), (3, 1), (4, 2)):
        saved(tmp_path, step, Retention(1), health={"skipped_in_a_row": row})
    assert steps(tmp_path) == [2, 4]
    saved(tmp_path, 5, Retention(1), health={"skipped_in_a_row": 0})
    assert steps(tmp_path) == [5]


def test_what_cannot_be_deleted_stays_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    saved(tmp_path, 2)

    def stuck(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", stuck)
        state = {"w": BoxedTensor.whole(torch.zeros(3))}
        told = store.save(tmp_path, 3, state, {}, MESH, Retention(1)).problems
    assert len(told) == 2 and "step-00000001 could not be deleted" in told[0]
    assert steps(tmp_path) == [3]
    saved(tmp_path, 4, Retention(1))  # and the next one clears up
    assert names(tmp_path) == ["step-00000004"]


def save_and_die(root: Path, calls: int) -> None:
    """Save step 4, keeping two, and die at the given call that changes files."""
    seen = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return call

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
    saved(root, 4, Retention(2))


def test_a_kill_at_any_call_of_save_and_retention_leaves_a_whole_one(
    two: Path, tmp_path: Path
) -> None:
    """SIGKILL at the first, second, ... call that changes files, until a save gets through."""
    # Forks of this process, which has imported torch already: each try costs milliseconds.
    for calls in range(1, 200):
        root = tmp_path / str(calls)
        shutil.copytree(two, root)
        saved(root, 3)
        pid = os.fork()
        if pid == 0:
            save_and_die(root, calls)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found = select("latest", root, MESH)
        assert found.path is not None and store.verify(found.path) == []
        assert not found.damaged
        if os.WIFEXITED(status):
            assert steps(root) == [3, 4]
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert folders.step_of(found.path) in (3, 4) and len(steps(root)) >= 2
        saved(root, 5, Retention(2))  # the next save clears up whatever was left
        assert len(names(root)) == 2 and steps(root)[-1] == 5
    assert calls > 10


def see_differently(root: str) -> list[str]:
    """Rank 1's listing is behind, then it lacks a file."""
    mesh = Mesh.build(1)
    original, size = folders.committed, manifest.size_of
    selection.PATIENCE_S = 0.5
    told = []
    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(selection, "committed", lambda r: original(r)[:1])
        told.append(str(select("latest", root, mesh).path))
        if mesh.rank == 1:
            patch.setattr(selection, "size_of", lambda p: size(p) if p.suffix == ".json" else None)
            patch.setattr(selection, "check", lambda p: None)
        try:
            select("latest", root, mesh)
        except CheckpointError as error:
            told.append(str(error))
    return told


def test_ranks_that_see_different_folders(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    everyone = run_ranks(2, see_differently, str(tmp_path))
    assert everyone[0] == everyone[1]
    assert everyone[0][0] == str(tmp_path / "step-00000002")
    assert "rank 1: state/rank-00000.safetensors" in everyone[0][1]
    assert "storage that all machines share" in everyone[0][1]


def test_odd_names_are_ignored_and_told(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in (9, 10):
        saved(tmp_path, step)
    for name in ("step-10.tmp", "step-abc", "step-00000011.tmp", "step-00000012", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000099").symlink_to(tmp_path / "nowhere")
    found = select("latest", tmp_path, MESH)
    assert found.path == tmp_path / "step-00000010"
    assert found.ignored == [
        "notes",
        "step-00000011.tmp",
        "step-00000012",
        "step-00000099",
        "step-10.tmp",
        "step-abc",
    ]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for value in (torch.nan, torch.inf, -torch.inf):
        sick = torch.zeros(5)
        sick[3] = value
        state = {"w": BoxedTensor.whole(torch.ones(2)), "m": BoxedTensor.whole(sick)}
        with pytest.raises(CheckpointError, match=r"not finite(.|\n)*\(1\):\n +m$"):
            store.save(tmp_path, 2, state, {}, MESH)
    assert names(tmp_path) == ["step-00000001"]
