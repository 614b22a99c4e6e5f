"""The job scripts on a real two-node Slurm cluster, for every way a run ends or is interrupted."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline

from soar_mega.telemetry.metrics import FILE_NAME as METRICS
from soar_mega.telemetry.metrics import read_metrics
from tests.runs import REPOSITORY, Tiny, assert_same_state, checkpoint, metrics
from tests.system.slurm_cluster import (
    Job,
    NoClusterError,
    SlurmCluster,
    slurm_cluster,
    why_not,
)

STEPS = 8
LAYOUT = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.pipeline_schedule=zero_bubble",
)
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
# srun's and the script's own limits are a minute together; a start takes its time here.
LIMIT_S = 90


@dataclass(frozen=True)
class Site:
    """A cluster and what a user of it has set up: ``cluster.env``, data and a model."""

    cluster: SlurmCluster
    tiny: Tiny
    folder: Path

    def environment(self, **settings: str) -> dict[str, str]:
        """What the user's shell has: the file with the cluster's settings, made here."""
        given = {
            "VENV": sys.prefix,
            "DOCTOR": "0",
            "LOG_DIR": str(self.folder / "logs"),
            **settings,
        }
        file = self.folder / f"cluster-{'-'.join(settings) or 'plain'}.env"
        example = (REPOSITORY / "slurm" / "cluster.env.example").read_text()
        own = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in given.items())
        file.write_text(own + example)
        return {"CLUSTER_ENV": str(file), "OMP_NUM_THREADS": "1"}

    def train(
        self, name: str, *overrides: str, options: tuple[str, ...] = TWO_BY_TWO, **settings: str
    ) -> str:
        """``sbatch slurm/train.sbatch``, from the repository; the job's id."""
        arguments = self.tiny.arguments("soar", self.run_dir(name), *overrides)
        return self.cluster.submit(
            *options,
            f"--output={self.folder}/{name}.log",
            f"--job-name={name}",
            "slurm/train.sbatch",
            *arguments,
            cwd=REPOSITORY,
            environment=self.environment(**settings),
        )

    def run_dir(self, name: str) -> Path:
        return self.folder / name

    def log(self, name: str) -> str:
        """The job's own log."""
        return (self.folder / f"{name}.log").read_text()

    def wait(self, number: str, name: str, state: str = "COMPLETED", code: int = 0) -> Job:
        """The job must end like that."""
        job = self.cluster.wait(number)
        assert (job.state, job.code) == (state, code), self.log(name)
        return job

    def until_step(self, name: str, step: int) -> None:
        """The run has done that many steps."""

        def there() -> bool:
            folder = self.run_dir(name)
            return (folder / METRICS).exists() and any(
                line["step"] >= step for line in read_metrics(folder)
            )

        self.cluster.until(there, f"step {step}")

    def until_restart(self, number: str, name: str, restarts: int) -> None:
        """The job was started again, as often as that, by itself."""
        try:
            self.cluster.until(
                lambda: self.cluster.job(number).restarts == restarts,
                f"restart {restarts}",
                LIMIT_S,
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(name)}") from error


@pytest.fixture(scope="module")
def site(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no Slurm cluster can be made here: {reason}")
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(slurm_cluster())
        except NoClusterError as error:
            pytest.skip(f"no Slurm cluster can be made here: {error}")
        yield Site(cluster, tiny, tmp_path_factory.mktemp("site"))


def long_run(*more: str) -> list[str]:
    return [
        *LAYOUT,
        f"train.max_train_steps={STEPS}",
        "train.global_batch_size=4",
        "checkpoint.checkpointing_steps=2",
        *more,
    ]


@pytest.fixture(scope="module")
def unbroken(site: Site) -> Path:
    """Two nodes, two tasks each, from sbatch to the last step; the run's folder."""
    job = site.train("unbroken", *long_run(), DOCTOR="1")
    assert site.wait(job, "unbroken").restarts == 0
    return site.run_dir("unbroken")


def assert_equal(run_dir: Path, unbroken: Path) -> None:
    """The same state and the same metrics, to the bit."""
    assert_same_state(checkpoint(run_dir, STEPS), checkpoint(unbroken, STEPS))
    assert metrics(run_dir) == metrics(unbroken)
    assert len(metrics(run_dir)) == STEPS


def test_slurm_trains_on_two_nodes(site: Site, unbroken: Path) -> None:
    log = site.log("unbroken")
    assert "start 1 of" in log and "done" in log
    assert "all 4 ranks on 2 hosts" in log and "doctor: no PROBLEM, exit code 0" in log
    (logs,) = (site.folder / "logs").glob("unbroken-*")
    assert {file.name for file in logs.glob("rank-*.log")} == {f"rank-{n}.log" for n in range(4)}
    assert (logs / "exit_code").read_text().strip() == "0"


def test_slurm_requeue_signal_and_a_killed_node(site: Site, unbroken: Path) -> None:
    """One job through all three, to the result of the unbroken one."""
    job = site.train("broken", *long_run())
    site.until_step("broken", 1)
    site.cluster.run("scontrol", "requeue", job)
    site.until_restart(job, "broken", 1)
    site.until_step("broken", 3)
    site.cluster.run("scancel", "--signal=USR1", job)
    site.until_restart(job, "broken", 1)
    site.until_step("broken", 5)
    victims = site.cluster.tasks(job, node=1)
    assert len(victims) == 2
    for process in victims:
        os.kill(process, signal.SIGKILL)
    killed = time.monotonic()
    site.until_restart(job, "broken", 3)
    assert time.monotonic() - killed < LIMIT_S
    site.wait(job, "broken")
    log = site.log("broken")
    assert log.count("saved after a signal (75)") >= 1, log
    assert log.count("crashed") == 1, log
    assert_equal(site.run_dir("broken"), unbroken)


@pytest.mark.full
def test_slurm_torchrun(site: Site, unbroken: Path) -> None:
    job = site.train("agents", *long_run(), LAUNCHER="torchrun")
    site.until_step("agents", 3)
    site.cluster.run("scancel", "--signal=USR1", job)
    assert site.wait(job, "agents").restarts == 1
    assert "saved after a signal (75)" in site.log("agents")
    assert_equal(site.run_dir("agents"), unbroken)


@pytest.fixture
def faulty(site: Site) -> str:
    """A virtual environment whose training command is tests/system/poisoned_train.py."""
    folder = site.folder / "faulty"
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    program = folder / "bin" / "python"
    program.write_text(
        f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m tests.system.poisoned_train "$@"\n'
    )
    program.chmod(0o755)
    return str(folder)


def dependent(site: Site, job: str) -> str:
    """What a chain has: a job that starts when this one is done."""
    return site.cluster.submit(
        f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap=true", cwd=site.folder
    )


def test_slurm_crashes_at_one_step(site: Site, faulty: str) -> None:
    """Every start dies in step 2; the retries are bounded and nothing that depends on it starts."""
    job = site.train(
        "crashing",
        "train.max_train_steps=3",
        "train.max_starts_without_progress=1",
        options=ONE,
        VENV=faulty,
        POISON="killed:2",
    )
    after = dependent(site, job)
    assert site.wait(job, "crashing", "FAILED", 93).restarts == 1
    log = site.log("crashing")
    assert "do not restart (93)" in log and "max_starts_without_progress = 1" in log
    site.cluster.until(lambda: site.cluster.job(after).state == "CANCELLED", "the chain's end")


def test_slurm_poisoned_steps(site: Site, faulty: str) -> None:
    """NaN from step 4 on: bounded skips, no second start, the last healthy checkpoint is named."""
    job = site.train(
        "poisoned",
        "train.max_train_steps=20",
        "checkpoint.checkpointing_steps=3",
        "train.max_skipped_steps=2",
        options=ONE,
        VENV=faulty,
        POISON="nan:4",
    )
    after = dependent(site, job)
    assert site.wait(job, "poisoned", "FAILED", 93).restarts == 0
    assert "step-00000003" in site.log("poisoned"), site.log("poisoned")
    site.cluster.until(lambda: site.cluster.job(after).state == "CANCELLED", "the chain's end")


def test_slurm_chain_from_pretraining_to_a_diffusers_folder(site: Site) -> None:
    configs = {
        "pretrain": "tensor_model_parallel_size: 2",
        "soar": "pipeline_model_parallel_size: 2",
    }
    for name, layout in configs.items():
        (site.folder / f"{name}.yaml").write_text(
            f"base: {REPOSITORY}/configs/tiny_{name}.yaml\n"
            f"run:\n  dir: {site.folder}/chain/{name}\n"
            f"model:\n  pretrained: {site.tiny.pretrained}\n"
            f"data:\n  shards: {site.tiny.shards('train')}\n"
            f"parallel:\n  {layout}\n"
            "train:\n  max_train_steps: 2\n"
        )
    printed = site.cluster.run(
        str(REPOSITORY / "slurm" / "pretrain_to_soar.sh"),
        "pretrain.yaml",
        "soar.yaml",
        "exported",
        *("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"),
        cwd=site.folder,
        environment=site.environment(),
    )
    last = printed.split("export ")[1].split()[0]
    job = site.cluster.wait(last)
    logs = {file.name: file.read_text() for file in site.folder.glob("soar_mega*.log")}
    assert (job.state, job.code) == ("COMPLETED", 0), logs
    pipeline = StableDiffusion3Pipeline.from_pretrained(site.folder / "exported")
    assert pipeline.transformer.config.num_layers == 3
    card = (site.folder / "exported" / "README.md").read_text()
    assert "pretrain" in card and "soar" in card


@pytest.mark.full
def test_slurm_docs_from_a_newcomers_shell(site: Site) -> None:
    """The lines of docs/slurm.md as they stand, with nothing edited but cluster.env."""
    home = site.folder / "home"
    home.mkdir()
    for name in ("configs", "tools", "soar_mega", "assets"):
        (home / name).symlink_to(REPOSITORY / name)
    (home / ".venv").symlink_to(sys.prefix)
    shutil.copytree(REPOSITORY / "slurm", home / "slurm")
    (home / "slurm" / "cluster.env").write_text(': "${SBATCH_PARTITION:=debug}"\n')
    text = (REPOSITORY / "docs" / "slurm.md").read_text()
    (block,) = re.findall(r"-->\n```bash\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=home,
        env={**site.cluster.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(file.read_text() for file in home.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    pipeline = StableDiffusion3Pipeline.from_pretrained(home / "runs" / "tiny" / "exported")
    assert pipeline.transformer is not None
    assert "PROBLEM  " not in done.stdout + logs
