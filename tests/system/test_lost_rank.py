"""A rank that dies or hangs within a step ends the others, who say what they waited for."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import REPOSITORY, Tiny

RANKS, LOST = 3, 1
TIMEOUT_S = 15.0
AWAITED = re.compile(
    r"process (\d) \(pipeline rank \1\) was (sending|receiving) the (activation|gradient|hand-over)"
    r" of pass (\w+), microbatch (\d+), (?:to|from) pipeline rank (\d) .* after ([\d.]+) s"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(tiny: Tiny, folder: Path, rank: int, port: int, how: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    arguments = tiny.arguments(
        "soar",
        folder / "run",
        f"parallel.pipeline_model_parallel_size={RANKS}",
        "parallel.pipeline_schedule=1f1b",
        f"parallel.distributed_timeout_minutes={TIMEOUT_S / 60}",
        "train.max_train_steps=2",
    )
    command = [sys.executable, "-m", "tests.system.lose_a_rank", how, str(LOST), "aux0", "1"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=(folder / f"out{rank}").open("w"),
        stderr=(folder / f"err{rank}").open("w"),
    )


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_others_end_and_name_what_they_waited_for(how: str, tiny: Tiny, tmp_path: Path) -> None:
    port = free_port()
    processes = [start(tiny, tmp_path, rank, port, how) for rank in range(RANKS)]
    try:
        lost = tmp_path / f"out{LOST}"
        deadline = time.monotonic() + 120
        while "lost at" not in lost.read_text():
            assert time.monotonic() < deadline, (tmp_path / f"err{LOST}").read_text()
            time.sleep(0.05)
        since = time.monotonic()
        others = [rank for rank in range(RANKS) if rank != LOST]
        for rank in others:
            assert processes[rank].wait(2 * TIMEOUT_S + 10) == 1
        took = time.monotonic() - since
        if how == "SIGKILL":
            assert processes[LOST].wait(5) == -signal.SIGKILL
        else:
            state = (
                Path(f"/proc/{processes[LOST].pid}/stat").read_text().rpartition(")")[2].split()[0]
            )
            assert state == "T"
        # A hung rank is found by the timeout, a dead one by its closed connection.
        assert took < (TIMEOUT_S + 10 if how == "SIGSTOP" else 10)
        for rank in others:
            found = AWAITED.search((tmp_path / f"err{rank}").read_text())
            assert found, (tmp_path / f"err{rank}").read_text()
            assert (int(found[1]), int(found[6])) == (rank, LOST)
            if how == "SIGSTOP":
                assert float(found[7]) <= TIMEOUT_S + 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
