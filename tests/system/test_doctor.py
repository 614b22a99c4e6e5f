"""tools/doctor.py on several processes, as srun and torchrun start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from soar_mega.launch.environment import ProcessEnvironment
from tests.ports import free_port
from tests.runs import REPOSITORY, Tiny, assert_nothing_written

# Seconds for late ones; a rank is at its port within that on a busy machine, too.
LIMIT_S = 20.0


@dataclass(frozen=True)
class Ended:
    """A process: exit code, both outputs, and the seconds until all had ended."""

    code: int
    out: str
    err: str
    took_s: float


def slurm(rank: int, world_size: int) -> dict[str, str]:
    """What srun sets for two nodes: the same job for all tests of this process."""
    half = world_size // 2
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % half),
        "SLURM_NODEID": str(rank // half),
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": f"{half}(x2)",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURMD_NODENAME": f"node{rank // half}",
        # All are this machine, whose own name may be loopback.
        "GLOO_SOCKET_IFNAME": "lo",
    }


def torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets, without a store of its agent."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def doctor(
    environments: Sequence[dict[str, str]],
    arguments: Sequence[str],
    limit_s: float = LIMIT_S,
    folders: Sequence[Path] = (),
) -> list[Ended]:
    """One process for each environment, in ``folders`` where they are given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER_"))}
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, REPOSITORY / "tools/doctor.py", "--limit", f"{limit_s:g}", *arguments],
            cwd=folder,
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for environment, folder in zip(
            environments, folders or [REPOSITORY] * len(environments), strict=True
        )
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    took = time.monotonic() - began
    return [
        Ended(process.returncode, out, err, took)
        for process, (out, err) in zip(processes, outputs, strict=True)
    ]


def test_a_job_that_is_well(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    ended = doctor([slurm(rank, 4) for rank in range(4)], tiny.arguments("soar", run))
    assert [one.code for one in ended] == [0] * 4, ended
    said = ended[0].out
    port = ProcessEnvironment.read(slurm(0, 4)).master_port
    for words in (
        "roll call: all 4 ranks on 2 hosts",
        "ranks 0-1 on node0, 2-3 on node1",
        "clocks: all within 0.",
        "the same on all 4 ranks",
        f"port: rank 0 listens on {port} of node0",
        "all-reduce: right over gloo on all 4 ranks",
        f"run.dir = {run} (",
        "seen by all 4 ranks",
        "48 samples",
        "keeping 2 (checkpoint.checkpoints_total_limit)",
        "doctor: no PROBLEM, exit code 0",
    ):
        assert words in said, said
    assert "PROBLEM  " not in said
    assert [one.out for one in ended[1:]] == [""] * 3, "rank 0 tells all"
    assert [one.err for one in ended] == [""] * 4
    assert not (tmp_path / "a").exists(), "it leaves nothing behind"


def test_a_rank_that_never_comes_is_named_in_time() -> None:
    port = free_port()
    limit_s = 8.0
    ended = doctor([torchrun(rank, 3, port) for rank in (0, 1)], [], limit_s)
    assert [one.code for one in ended] == [1, 1], ended
    assert "1 of 3 ranks did not come within 8 s: 2\n" in ended[0].out
    assert "here are ranks 0-1 on " in ended[0].out
    assert ended[0].took_s < limit_s + 30


def test_a_taken_port_and_a_rank_without_rank_0() -> None:
    """Of two jobs: one has rank 0 alone, whose port is taken, the other rank 1 alone."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        zero, one = doctor([torchrun(0, 2, port), torchrun(1, 2, free_port())], [], 2.0)
    assert (zero.code, one.code) == (1, 1)
    assert f"cannot listen on {port}" in zero.out
    assert "rank 1 on " in one.err and "the connection is refused" in one.err
    assert "Traceback" not in one.err


def test_a_rank_with_another_configuration(tiny: Tiny, tmp_path: Path) -> None:
    """The same arguments: the file differs."""
    path, *overrides = tiny.arguments("soar", tmp_path / "run")
    folders = [tmp_path / "0", tmp_path / "1"]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        (folder / "c.yaml").write_text(f"base: {path}\nrun: {{seed: {rank}}}\n")
    port = free_port()
    arguments = ["c.yaml", *overrides]
    ended = doctor([torchrun(r, 2, port) for r in range(2)], arguments, folders=folders)
    assert [one.code for one in ended] == [78, 78], ended
    assert "configuration: rank 1 on " in ended[0].out
    assert "another one than rank 0" in ended[0].out
    assert "starting again does not help" in ended[0].out
    assert_nothing_written(tmp_path / "run")


@pytest.mark.parametrize(
    ("shards", "code", "words"),
    [("few", 78, "the samples on rank 1 on node1"), (None, 1, "data and model on rank 1 on node1")],
)
def test_a_node_with_other_data(
    tiny: Tiny, tmp_path: Path, shards: str | None, code: int, words: str
) -> None:
    """The same path: one node has other files there, or none, which another node may have."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, prefix in zip(folders, ("train", shards), strict=True):
        folder.mkdir()
        for shard in tiny.folder.glob(f"shards/{prefix}-*.tar") if prefix else ():
            (folder / f"data-{shard.stem[-1]}.tar").symlink_to(shard)
    arguments = tiny.arguments("soar", tmp_path / "run", "data.shards=data-*.tar")
    ended = doctor([slurm(rank, 2) for rank in range(2)], arguments, folders=folders)
    assert [one.code for one in ended] == [code] * 2, ended
    assert words in ended[0].out, ended[0].out


def test_a_configuration_that_cannot_work(tiny: Tiny, tmp_path: Path) -> None:
    """One process alone: the model is not there."""
    gone = f"model.pretrained={tmp_path / 'gone'}"
    (ended,) = doctor([{}], tiny.arguments("soar", tmp_path / "run", gone))
    assert ended.code == 78
    assert "PROBLEM  data and model: model.pretrained=" in ended.out
    assert "roll call" not in ended.out
    assert_nothing_written(tmp_path / "run")
