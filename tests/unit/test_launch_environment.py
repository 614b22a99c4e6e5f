"""Which process of a run this is, and the record of what it was started with."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import soar_mega
from soar_mega.config import ConfigError
from soar_mega.launch.environment import ProcessEnvironment, first_host
from soar_mega.launch.provenance import git_state, redact, write_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu003",
    "MASTER_PORT": "29501",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_one_process() -> None:
    found = ProcessEnvironment.read({"PATH": "/bin", "MASTER_ADDR": "elsewhere"})
    assert (found.rank, found.world_size, found.local_rank) == (0, 1, 0)
    assert found.launcher == "single"
    assert found.master_address == "127.0.0.1"


def test_torchrun() -> None:
    expected = ProcessEnvironment(5, 8, 1, 4, "gpu003", 29501, "torchrun")
    assert ProcessEnvironment.read(TORCHRUN) == expected
    assert ProcessEnvironment.read(SRUN | TORCHRUN) == expected, "torchrun inside srun wins"


def test_srun() -> None:
    found = ProcessEnvironment.read(SRUN)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (3, 4, 1, 2)
    assert (found.master_address, found.launcher) == ("n1", "slurm")


def test_srun_without_step_variables() -> None:
    three = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "n7"}
    found = ProcessEnvironment.read(three)
    assert (found.rank, found.world_size, found.local_rank, found.master_address) == (1, 2, 1, "n7")


def test_srun_inside_a_larger_allocation_counts_its_own_tasks() -> None:
    environ = SRUN | {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "4"}
    assert ProcessEnvironment.read(environ).world_size == 4


def test_slurm_port_is_one_per_job_and_the_same_on_all_ranks() -> None:
    ports = {ProcessEnvironment.read(SRUN | {"SLURM_PROCID": str(r)}).master_port for r in range(4)}
    assert len(ports) == 1
    assert 15000 <= ports.pop() < 32000
    other = ProcessEnvironment.read(SRUN | {"SLURM_JOB_ID": "1235"}).master_port
    again = ProcessEnvironment.read(SRUN | {"SLURM_STEP_ID": "1"}).master_port
    assert len({ProcessEnvironment.read(SRUN).master_port, other, again}) == 3
    assert ProcessEnvironment.read(SRUN | {"MASTER_PORT": "7"}).ports == (7,)


def test_slurm_spare_ports_and_job_names_tell_jobs_apart() -> None:
    found = ProcessEnvironment.read(SRUN)
    assert len(set(found.ports)) == 5 and all(15000 <= port < 32000 for port in found.ports)
    again = ProcessEnvironment.read(SRUN | {"SLURM_RESTART_COUNT": "1"})
    assert again.job != found.job and again.ports == found.ports
    # The ports of a day's jobs, two of which share a node, do not get in each other's way.
    for job in range(2000, 3000):
        one = ProcessEnvironment.read(SRUN | {"SLURM_JOB_ID": str(job)}).ports
        assert not set(one) & set(
            ProcessEnvironment.read(SRUN | {"SLURM_JOB_ID": str(job + 1)}).ports
        )


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_python_in_a_batch_script_runs_alone_and_says_so(
    step: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    environ |= {} if step is None else {"SLURM_STEP_ID": step}
    with caplog.at_level(logging.WARNING):
        assert ProcessEnvironment.read(environ).launcher == "single"
    assert "4 tasks" in caplog.text


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("gpu[7,9-12]-ib", "gpu7-ib"),
        ("r[1-2]c[03-04],x", "r1c03"),
        ("a,b[1-2]", "a"),
        ("node-[01-03,7]", "node-01"),
        ("node-[7,01-03].cluster,node-9", "node-7.cluster"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        (TORCHRUN | {"RANK": "x"}, "RANK = 'x' must be a whole number"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT = 0 must be between"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, "no nodes"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "SLURM_LOCALID is not set"),
    ],
)
def test_broken_environments_are_refused(environ: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        ProcessEnvironment.read(environ)


# --- env.json ----------------------------------------------------------------------------------


def test_environment_is_written(tmp_path: Path) -> None:
    command = ["python", "-m", "soar_mega.train", "a.yaml", "hub.token=abc"]
    path = write_environment(tmp_path / "run", ProcessEnvironment.read(TORCHRUN), command)
    record = json.loads(path.read_text())
    assert path == tmp_path / "run" / "env.json"
    assert record["soar_mega"] == soar_mega.__version__
    assert record["command"] == [*command[:4], "hub.token=***"]
    assert record["packages"]["torch"]
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["process"]["rank"] == 5
    assert [entry.name for entry in path.parent.iterdir()] == ["env.json"]


def git(folder: Path, *arguments: str) -> None:
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org"}
    identity |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}
    command = ["git", "-C", str(folder), *arguments]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | identity)


def test_git_state_follows_the_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init")
    assert git_state(tmp_path) == {"revision": None, "dirty": False}
    (tmp_path / "a").write_text("1")
    assert git_state(tmp_path) == {"revision": None, "dirty": True}
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == clean | {"dirty": True}
    (tmp_path / "inner").mkdir()
    assert git_state(tmp_path / "inner") is None, "a package installed inside another repository"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["--token", "abc", "x"], ["--token", "***", "x"]),
        (["--hf-token=abc"], ["--hf-token=***"]),
        (["WANDB_API_KEY=abc"], ["WANDB_API_KEY=***"]),
        (["hub.password=a=b c"], ["hub.password=***"]),
        (["s3://user:pw@host/x"], ["s3://***@host/x"]),
        (["run.name=hf_" + "a" * 20], ["run.name=***"]),
        (["--token", "--quiet", "x"], ["--token", "--quiet", "x"]),
        (["data.max_sequence_length=77"], ["data.max_sequence_length=77"]),
        (["train.max_train_steps=5", "a@b"], ["train.max_train_steps=5", "a@b"]),
    ],
)
def test_secrets_are_not_written(command: list[str], shown: list[str]) -> None:
    assert redact(command) == shown
