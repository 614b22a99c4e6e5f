"""Signals reach the training however Slurm sends them; the job script lives to read its code."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.slurm_jobs import FakeCluster

TERMINATED = -15  # Slurm's end of a job that is requeued
BOTH_RANKS = (0, 1)


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    made = FakeCluster(tmp_path)
    made.environ |= {"FAKE_RUN_SAVES": "0.4", "FAKE_RUN_CODE": "75"}
    return made


def saved(cluster: FakeCluster, job: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What both ranks recorded, of a job that saved and was requeued once."""
    code, log = cluster.end(job)
    runs = [cluster.run(rank) for rank in BOTH_RANKS]
    assert code == TERMINATED and cluster.requeued() == ["77"], log
    assert "saved after a signal (75)" in log and "crashed" not in log
    assert [run["saved"] for run in runs] == [True, True]
    return runs


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_slurm_signal_to_the_batch_shell_alone_reaches_every_task(
    cluster: FakeCluster, number: signal.Signals
) -> None:
    job = cluster.start("a.yaml")
    for rank in BOTH_RANKS:
        cluster.run(rank)
    job.send_signal(number)
    # srun kills its tasks at a TERM.
    expected = "SIGUSR1" if number == signal.SIGTERM else number.name
    assert [run["received"] for run in saved(cluster, job)] == [[expected]] * 2


@pytest.mark.parametrize("shell_too", [False, True])
def test_slurm_signal_to_the_step_reaches_python(cluster: FakeCluster, shell_too: bool) -> None:
    job = cluster.start("a.yaml")
    for rank in BOTH_RANKS:
        cluster.run(rank)
    for task in cluster.tasks():
        os.kill(task, signal.SIGUSR1)
    if shell_too:  # scancel --full; the run itself notes the first signal alone
        job.send_signal(signal.SIGUSR1)
    for run in saved(cluster, job):
        assert set(run["received"]) == {"SIGUSR1"}


def test_slurm_signals_during_the_save_do_not_hurt(cluster: FakeCluster) -> None:
    job = cluster.start("a.yaml")
    for rank in BOTH_RANKS:
        cluster.run(rank)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        job.send_signal(number)
        time.sleep(0.1)
    saved(cluster, job)


def test_slurm_signal_before_the_training_requeues_without_it(cluster: FakeCluster) -> None:
    settings = cluster.home / "slurm" / "cluster.env"
    settings.write_text("kill -USR1 $$\n")
    code, log = cluster.job("a.yaml")
    assert code == TERMINATED and cluster.requeued() == ["77"], log
    assert cluster.calls("srun") == []


@pytest.mark.parametrize(
    ("runtime", "number"),
    [
        ("apptainer", signal.SIGUSR1),
        pytest.param("apptainer", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("venv", signal.SIGUSR1, marks=pytest.mark.full),
        pytest.param("venv", signal.SIGTERM, marks=pytest.mark.full),
    ],
)
def test_slurm_signal_to_torchrun_reaches_the_workers_who_finish(
    cluster: FakeCluster, runtime: str, number: signal.Signals
) -> None:
    cluster.environ |= {"LAUNCHER": "torchrun", "MASTER_ADDR": "localhost", "FAKE_TASKS": "1"}
    cluster.environ |= {"RUNTIME": runtime, "CONTAINER_IMAGE": "image.sif"}
    job = cluster.start("a.yaml", MASTER_PORT=str(free_port()))
    for rank in BOTH_RANKS:
        cluster.run(rank)
    (node,) = cluster.tasks()
    os.kill(node, number)
    for run in saved(cluster, job):
        assert run["received"][0] == number.name
        assert run["environ"]["LOCAL_WORLD_SIZE"] == "2"


def test_slurm_signal_to_all_processes_of_a_torchrun_node(cluster: FakeCluster) -> None:
    # As Slurm does where it does not track processes by cgroup.
    cluster.environ |= {"LAUNCHER": "torchrun", "MASTER_ADDR": "localhost", "FAKE_TASKS": "1"}
    job = cluster.start("a.yaml", MASTER_PORT=str(free_port()))
    for rank in BOTH_RANKS:
        cluster.run(rank)
    (node,) = cluster.tasks()
    agent = children(node)
    for pid in (node, *agent, *(worker for one in agent for worker in children(one))):
        os.kill(pid, signal.SIGTERM)
    for run in saved(cluster, job):
        assert run["received"][0] == "SIGTERM"
    # Which the agent would do by itself: it kills what has not ended 30 seconds later.
    log = (cluster.work / "logs" / "soar-77" / "rank-0.log").read_text()
    assert "shutting down workers" not in log


def children(pid: int) -> list[int]:
    return [
        int(child)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text().split()
    ]
