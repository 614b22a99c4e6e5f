"""A rank that dies or hangs within a step ends the others, who say what they waited for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.ports import free_port
from tests.runs import REPOSITORY, Tiny

TIMEOUT_S = 15.0
AWAITED = re.compile(
    r"process (\d) \(pipeline rank \d\) was (sending|receiving) the (activation|gradient|hand-over)"
    r" of pass (\w+), microbatch (\d+), (?:to|from) pipeline rank (\d) .* after ([\d.]+) s"
)
TENSOR_PEER = (
    "process {rank} (pipeline rank {pipeline}, tensor-parallel rank 0) was in the backward of pass "
    "aux0, microbatch 1: waiting for tensor-parallel peers: "
)


def start(
    tiny: Tiny, folder: Path, rank: int, port: int, how: str, lost: int, pipeline: int, tensor: int
) -> subprocess.Popen[str]:
    world = str(pipeline * tensor)
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    arguments = tiny.arguments(
        "soar",
        folder / "run",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"parallel.tensor_model_parallel_size={tensor}",
        "parallel.pipeline_schedule=1f1b",
        f"parallel.distributed_timeout_minutes={TIMEOUT_S / 60}",
        "train.max_train_steps=2",
    )
    command = [sys.executable, "-m", "tests.system.lose_a_rank", how, str(lost), "aux0", "1"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=(folder / f"out{rank}").open("w"),
        stderr=(folder / f"err{rank}").open("w"),
    )


def lose(
    tiny: Tiny, folder: Path, how: str, lost: int, pipeline: int, tensor: int
) -> tuple[dict[int, str], float]:
    """What each other rank wrote to stderr, and how long it took until the last had ended."""
    port = free_port()
    parts = (port, how, lost, pipeline, tensor)
    ranks = range(pipeline * tensor)
    processes = [start(tiny, folder, rank, *parts) for rank in ranks]
    try:
        deadline = time.monotonic() + 120
        while "lost at" not in (folder / f"out{lost}").read_text():
            assert time.monotonic() < deadline, (folder / f"err{lost}").read_text()
            time.sleep(0.05)
        since = time.monotonic()
        others = [rank for rank in ranks if rank != lost]
        for rank in others:
            assert processes[rank].wait(2 * TIMEOUT_S + 10) == 1
        took = time.monotonic() - since
        if how == "SIGKILL":
            assert processes[lost].wait(5) == -signal.SIGKILL
        else:
            status = Path(f"/proc/{processes[lost].pid}/stat").read_text()
            assert status.rpartition(")")[2].split()[0] == "T", "it is stopped, not gone"
        return {rank: (folder / f"err{rank}").read_text() for rank in others}, took
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_hung_rank(tiny: Tiny, tmp_path: Path) -> None:
    """The middle of three: both neighbours wait for it, until the configured time is over."""
    errors, took = lose(tiny, tmp_path, "SIGSTOP", 1, pipeline=3, tensor=1)
    assert took < TIMEOUT_S + 10
    for rank, error in errors.items():
        found = AWAITED.search(error)
        assert found, error
        assert (int(found[1]), int(found[6])) == (rank, 1)
        assert TIMEOUT_S - 1 < float(found[7]) < TIMEOUT_S + 1


def test_dead_rank(tiny: Tiny, tmp_path: Path) -> None:
    """Of two times two: found at once by its closed connections, by its tensor peer too."""
    errors, took = lose(tiny, tmp_path, "SIGKILL", 3, pipeline=2, tensor=2)
    assert took < 10
    assert TENSOR_PEER.format(rank=2, pipeline=1) in errors[2], errors[2]
    # The others wait for one of those two, by message or within a tensor-parallel layer.
    for rank in (0, 1):
        named = AWAITED.search(errors[rank]) or "waiting for tensor-parallel peers" in errors[rank]
        assert named and re.search(r"of pass \w+, microbatch \d", errors[rank]), errors[rank]
