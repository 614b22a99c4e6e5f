"""Runs the real job scripts among fake Slurm commands, as Slurm would: copied, in bash.

Nothing else is on the path, so a Slurm that is installed here is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.runs import REPOSITORY

FAKES = ("sbatch", "srun", "scontrol", "apptainer")
TOOLS = ["bash", "cat", "date", "dirname", "grep", "head", "mkdir", "rm", "sleep", "tail", "tr"]
# Of a job of two tasks on one node; a batch shell itself counts as task 0.
JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "soar",
    "SLURM_JOB_NODELIST": "node-[01-03,7]",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
LIMIT_S = 60.0


class FakeCluster:
    """A repository, a working directory, and commands, all in ``folder``.

    Attributes:
        home: The repository: the real scripts, a fake run and a fake virtual environment.
        work: The folder that jobs are submitted in.
        environ: Of every command; a test changes it.
    """

    def __init__(self, folder: Path) -> None:
        self.home = folder / "soar mega's $HOME"
        self.work = folder / 'a "working" 100%t dir'
        self.fakes = folder / "fakes"
        for made in (self.home / "soar_mega", self.home / "tools", self.work, self.fakes / "bin"):
            made.mkdir(parents=True)
        scripts = shutil.ignore_patterns("cluster.env")
        shutil.copytree(REPOSITORY / "slurm", self.home / "slurm", ignore=scripts)
        (self.home / "soar_mega" / "__init__.py").touch()
        (self.home / "soar_mega" / "config").symlink_to(REPOSITORY / "soar_mega" / "config")
        for name in ("encode_data", "convert_to_diffusers", "evaluate"):
            shutil.copy(REPOSITORY / "tests" / "fake_run.py", self.home / "tools" / f"{name}.py")
        shutil.copy(REPOSITORY / "tests" / "fake_run.py", self.home / "soar_mega" / "train.py")
        self.program(self.home / ".venv" / "bin" / "python", f'exec {_PYTHON} "$@"')
        fake = shlex.quote(str(REPOSITORY / "tests" / "fake_slurm.py"))
        for name in FAKES:
            self.program(self.fakes / "bin" / name, f'exec {_PYTHON} -S {fake} {name} "$@"')
        for name in TOOLS:
            (self.fakes / "bin" / name).symlink_to(str(shutil.which(name)))
        self.environ = {
            "PATH": str(self.fakes / "bin"),
            "HOME": str(folder),
            "FAKE_SLURM": str(self.fakes),
            "FAKE_RUN_CODE": "0",
            "FAKE_TASKS": "2",
            "SOAR_MEGA_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "DOCTOR": "0",
        }

    def program(self, path: Path, line: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def start(
        self, *arguments: str, script: str = "train.sbatch", **environ: str
    ) -> subprocess.Popen[str]:
        """Start a job; options in capitals are environment."""
        copy = self.fakes / "slurm_script"
        shutil.copy(self.home / "slurm" / script, copy)
        return subprocess.Popen(
            ["bash", str(copy), *arguments],
            cwd=self.work,
            env=self.environ | JOB | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def job(self, *arguments: str, script: str = "train.sbatch", **environ: str) -> tuple[int, str]:
        """Run a job to its end: its code (negative: the signal that ended it) and its log."""
        return self.end(self.start(*arguments, script=script, **environ))

    def end(self, job: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for a job, and end what it left, as Slurm does."""
        try:
            job.wait(LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            log = job.communicate()[0]
        return job.returncode, log

    def calls(self, program: str) -> list[dict[str, Any]]:
        """What the fake was called with: ``arguments``, ``environ``, ``stdin``."""
        file = self.fakes / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for line in lines if (call := json.loads(line))["program"] == program]

    def training(self) -> list[str]:
        """The command line of the one srun that trains."""
        commands = [list(call["arguments"]) for call in self.calls("srun")]
        (found,) = (command for command in commands if "soar_mega.train" in command)
        return found

    def requeued(self) -> list[str]:
        """The ids that scontrol was asked to requeue."""
        calls = (call["arguments"] for call in self.calls("scontrol"))
        return [arguments[1] for arguments in calls if arguments[0] == "requeue"]

    def run(self, rank: int = 0) -> dict[str, Any]:
        """What the fake run of a rank recorded last, once it has."""
        file = self.fakes / f"run-{rank}.json"
        end = time.monotonic() + LIMIT_S
        while not file.exists():
            assert time.monotonic() < end, f"rank {rank} did not start"
            time.sleep(0.02)
        return dict(json.loads(file.read_text()))

    def tasks(self) -> list[int]:
        """Process ids of the step's tasks, which are what Slurm signals."""
        return [int(pid) for pid in (self.fakes / "tasks").read_text().split()]


_PYTHON = shlex.quote(sys.executable)
