"""Saving in the background: what is saved, when errors are told, that nothing waits for ever."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.checkpointer import Checkpointer
from soar_mega.checkpoint.errors import CheckpointError, DiskFullError
from soar_mega.checkpoint.retention import Retention
from soar_mega.checkpoint.selection import select
from soar_mega.checkpoint.torch_arrays import as_tensor
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh
from tests.distributed.harness import run_ranks

MESH = Mesh.single()


def held_back(patch: pytest.MonkeyPatch) -> threading.Event:
    """Saves wait for this before their first byte."""
    go, original = threading.Event(), store.save

    def late(*arguments: Any, **more: Any) -> store.Saved:
        assert go.wait(60)
        return original(*arguments, **more)

    patch.setattr(store, "save", late)
    return go


def test_what_is_saved_is_the_state_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, as the second copy goes into the buffers of the first; constants are not copied."""
    go = held_back(monkeypatch)
    weights, padded, fixed = torch.zeros(7, 3), torch.zeros(5, 4), torch.full((3,), 9.0)
    half = torch.zeros(4, dtype=torch.bfloat16)
    state = {
        "w": BoxedTensor.whole(weights),
        "strided": BoxedTensor.whole(padded[:, :3]),
        "half": BoxedTensor.whole(half),
        "fixed": BoxedTensor.whole(fixed, constant=True),
    }
    checkpointer = Checkpointer(tmp_path, MESH)
    for step in (1, 2):
        go.clear()
        for tensor in (weights, padded, half):
            tensor.fill_(step)
        extra = {"step": step}
        checkpointer.save(step, state, extra)
        extra["step"] = 99
        for tensor in (weights, padded, half):
            tensor.fill_(-1)
        assert not store.committed(tmp_path) or step == 2
        assert checkpointer.finished() == []  # asked while the thread is in the middle of it
        go.set()
        checkpointer.settle()
        path = tmp_path / f"step-{step:08d}"
        assert [saved.path for saved in checkpointer.finished()] == [path]
        reader = store.StateReader(path)
        assert torch.equal(as_tensor(reader.read("w")), torch.full((7, 3), float(step)))
        assert torch.equal(as_tensor(reader.read("strided")), torch.full((5, 3), float(step)))
        assert torch.equal(
            as_tensor(reader.read("half")), torch.full((4,), step, dtype=torch.bfloat16)
        )
        assert torch.equal(as_tensor(reader.read("fixed")), fixed)
        assert store.read_extra(path) == {"step": step}


def test_the_next_save_waits_for_the_one_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = held_back(monkeypatch)
    state = {"w": BoxedTensor.whole(torch.ones(3))}
    checkpointer = Checkpointer(tmp_path, MESH, Retention(1))
    checkpointer.save(1, state, {})
    threading.Timer(0.3, go.set).start()
    began = time.perf_counter()
    checkpointer.save(2, state, {})
    assert time.perf_counter() - began > 0.2
    checkpointer.settle()
    assert [path.name for path in store.committed(tmp_path)] == ["step-00000002"]


def test_an_error_of_the_thread_is_told_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    state = {"w": BoxedTensor.whole(torch.ones(3))}
    for call in ("settle", "save"):
        checkpointer = Checkpointer(tmp_path, MESH)
        with monkeypatch.context() as patch:
            patch.setattr("soar_mega.checkpoint.store.write_manifest", full)
            checkpointer.save(1, state, {})
            checkpointer.join()
        assert checkpointer.failed and not checkpointer.finished()
        with pytest.raises(DiskFullError, match="No space left"):
            checkpointer.settle() if call == "settle" else checkpointer.save(2, state, {})
        assert not checkpointer.failed
        checkpointer.save(3, state, {})  # and it goes on
        checkpointer.settle()
        assert select("latest", tmp_path, MESH).path == tmp_path / "step-00000003"


LAYOUT = ParameterLayout((8, 1000), 0, "sharded")


def stress(root: str) -> list[str]:
    """Saves back to back while training talks over the default group; one rank's disk fills up."""
    mesh = Mesh.build(1)
    checkpointer = Checkpointer(Path(root), mesh, Retention(2))
    rows = torch.zeros(4000)
    begin = mesh.data_rank * 4000
    told = []
    for step in range(1, 9):
        rows.fill_(10 * step + mesh.rank)
        state = {"w": BoxedTensor.from_range(LAYOUT, mesh, begin, begin + 4000, rows)}
        with pytest.MonkeyPatch.context() as patch:
            if step == 5 and mesh.rank == 1:

                def full(*_: Any) -> None:
                    raise OSError(errno.EDQUOT, "Disk quota exceeded")

                checkpointer.join()  # a busy machine still writes step 4
                patch.setattr("soar_mega.checkpoint.state_files.DataFile.write", full)
            try:
                checkpointer.save(step, state, {"step": step})
            except CheckpointError as error:
                told.append(f"at {step}: {error}")
                checkpointer.save(step, state, {"step": step})
            rows.fill_(-1)
            for _ in range(20):  # the main thread's own collectives, in another group
                dist.all_reduce(torch.ones(1000))
            if step == 5:
                checkpointer.join()
    checkpointer.settle()
    return told


def test_ranks_that_save_while_they_train(tmp_path: Path) -> None:
    told = run_ranks(2, stress, str(tmp_path))
    assert told[0] == told[1]
    assert len(told[0]) == 1 and told[0][0].startswith("at 6: ")
    assert "rank 1: OSError" in told[0][0] and "bytes are missing" in told[0][0]
    paths = store.committed(tmp_path)
    assert [path.name for path in paths] == ["step-00000007", "step-00000008"]
    for step, path in zip((7, 8), paths, strict=True):
        assert store.verify(path) == []
        rows = as_tensor(store.StateReader(path).read("w"))
        assert torch.equal(rows[:4], torch.full((4, 1000), 10.0 * step))
        assert torch.equal(rows[4:], torch.full((4, 1000), 10.0 * step + 1))


_LEAVES = """
import sys, time
from pathlib import Path
import torch
from soar_mega.checkpoint import state_files
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.checkpointer import Checkpointer
from soar_mega.parallel.mesh import Mesh

write = state_files.DataFile.write

def slow(self, tensor):
    print("writing", flush=True)
    time.sleep(1)
    write(self, tensor)

state_files.DataFile.write = slow
Checkpointer(Path(sys.argv[1]), Mesh.single()).save(1, {"w": BoxedTensor.whole(torch.ones(9))}, {})
"""


@pytest.mark.parametrize("killed", [False, True])
def test_leaving_while_a_save_is_under_way(killed: bool, tmp_path: Path) -> None:
    """The end of the program waits for it; a kill does not, and commits nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", _LEAVES, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    if killed:
        process.kill()
    assert process.wait(60) == (-signal.SIGKILL if killed else 0)
    found = select("latest", tmp_path, MESH).path
    assert (found is None) == killed
