"""A real Slurm cluster of two nodes on this machine, from Debian's slurm-wlm and munge.

``python -m tests.system.slurm_cluster`` starts one and a shell in it, to try things by hand.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.ports import free_ports

NODES = ("n1", "n2")
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
# Debian's places for daemons, which a user's PATH may lack.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_ENDS = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
# cred_expire: a requeued job waits that long before it starts again (120 s by default).
# linuxproc and task/none: no cgroups, which containers often have no right to.
# config_overrides: a node may claim more CPUs than the machine has.
_CONFIGURATION = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
KillWait=20
GresTypes=gpu
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd is started by root only"
    # The nodes' names are looked up in a hosts file of their own.
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "no right to a mount namespace (unshare --mount)"


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job.

    Attributes:
        state: As RUNNING.
        reason: Why it is in that state.
        code: Exit code of its script.
        restarts: How often it was started again.
    """

    state: str
    reason: str
    code: int
    restarts: int

    @property
    def ended(self) -> bool:
        """For good."""
        return self.state in _ENDS


class SlurmCluster:
    """A running cluster; ``folder`` holds its files and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def run(
        self, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> str:
        """Output of a program of Slurm's, which must succeed."""
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> str:
        """``sbatch``; the job's id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, environment=environment).strip()

    def job(self, number: str) -> Job:
        """How a job stands."""
        shown = self.run("scontrol", "show", "job", number)
        known = dict(re.findall(r"(\w+)=(\S*)", shown))
        code = int(known["ExitCode"].split(":")[0])
        return Job(known["JobState"], known["Reason"], code, int(known["Restarts"]))

    def wait(self, number: str, seconds: float = 120) -> Job:
        """Until a job has ended for good."""
        self.until(lambda: self.job(number).ended, f"the end of job {number}", seconds)
        return self.job(number)

    def until(self, what: Callable[[], object], name: str, seconds: float = 120) -> None:
        """Wait for something; fails with Slurm's view of the queue."""
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} did not come within {seconds:g} s:\n{self._queue()}")
            time.sleep(0.1)

    def _queue(self) -> str:
        try:
            return self.run("scontrol", "show", "job")
        except AssertionError as error:
            return str(error)

    def tasks(self, number: str, node: int) -> list[int]:
        """Process ids of the running step of a job on a node (0 or 1)."""
        wanted = {"SLURM_JOB_ID": number, "SLURM_NODEID": str(node)}
        # The batch script and its srun are in no step of several tasks.
        return [
            process
            for process, variables in _processes()
            if wanted.items() <= variables.items() and "SLURM_STEP_NUM_TASKS" in variables
        ]


def _processes() -> Iterator[tuple[int, dict[str, str]]]:
    """All that may be looked at, with their environment."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "environ").read_bytes().decode(errors="replace")
            except OSError:  # gone
                continue
            pairs = (variable.partition("=") for variable in text.split("\0"))
            yield int(entry.name), {name: value for name, _, value in pairs}


class NoClusterError(RuntimeError):
    """Its daemons do not start on this machine."""


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start the cluster; its processes and those of its jobs are gone afterwards.

    Raises:
        NoClusterError: It does not start.
    """
    with ExitStack() as stack:
        # Sockets' paths are short, and munged asks for a folder that others can enter.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="slurm-")))
        folder.chmod(0o755)
        controller_port, *ports = free_ports(1 + len(NODES))
        _write_configuration(folder, controller_port, ports)
        cluster = SlurmCluster(folder)
        try:
            socket_, key = folder / "munge.socket", folder / "munge.key"
            subprocess.run(
                ["mungekey", "--create", f"--keyfile={key}"], env={"PATH": _PATH}, check=True
            )
            munged = f"munged --foreground --force --socket={socket_} --key-file={key}"
            files = {"pid": "munged.pid", "log": "munged.log", "seed": "munged.seed"}
            munged += "".join(f" --{what}-file={folder / name}" for what, name in files.items())
            stack.enter_context(_daemon(cluster, "munged", munged))
            cluster.until(socket_.exists, "munged", 20)
            stack.enter_context(_daemon(cluster, "slurmctld", "slurmctld -D"))
            for node in NODES:
                stack.enter_context(_daemon(cluster, node, f"slurmd -D -N {node}"))
            stack.callback(_end_jobs, cluster)
            cluster.until(lambda: _idle(cluster), "two idle nodes", 40)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            said = "".join(file.read_text()[-500:] for file in sorted(folder.glob("*.out")))
            raise NoClusterError(f"{error}\n{said}") from error
        yield cluster


def _write_configuration(folder: Path, controller_port: int, ports: list[int]) -> None:
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=32 "
        "RealMemory=1000 Gres=gpu:2"
        for node, port in zip(NODES, ports, strict=True)
    )
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            host=host,
            controller_port=controller_port,
            folder=folder,
            nodes=nodes,
            names=",".join(NODES),
        )
    )
    # Slurm counts the files only.
    for number in range(2):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    known = Path("/etc/hosts").read_text()
    (folder / "hosts").write_text(known + "".join(f"\n127.0.0.1 {node}" for node in NODES) + "\n")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()


@contextmanager
def _daemon(cluster: SlurmCluster, name: str, command: str) -> Iterator[None]:
    hosts = shlex.quote(str(cluster.folder / "hosts"))
    with (cluster.folder / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "sh",
                "-c",
                f"mount --bind {hosts} /etc/hosts && exec {command}",
            ],
            env=cluster.environment,
            stdout=output,
            stderr=output,
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _idle(cluster: SlurmCluster) -> bool:
    try:
        states = cluster.run("sinfo", "--noheader", "--format=%D %t").split()
    except AssertionError:  # the controller does not answer yet
        return False
    return states == [str(len(NODES)), "idle"]


def _end_jobs(cluster: SlurmCluster) -> None:
    """No process of a job outlives the cluster."""
    with suppress(AssertionError):  # of a controller that never came
        cluster.run("scancel", "--user=root")
    configuration = str(cluster.folder / "slurm.conf")
    for process, variables in _processes():
        if variables.get("SLURM_CONF") == configuration and "SLURM_JOB_ID" in variables:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    with slurm_cluster() as running:
        subprocess.run([os.environ.get("SHELL", "bash")], env=running.environment, check=False)
