"""Which process of a run this is, from torchrun's or Slurm's variables."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from soar_mega.config import ConfigError

# Slurm gives steps that are no srun step (the batch script, an interactive shell) numbers up here.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

# The same on all nodes, different for jobs that share a node, and below Linux' ephemeral ports: no
# outgoing connection sits on one.
_FIRST_PORT, _PORTS, _SPARE_PORTS = 15000, 17000, 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessEnvironment:
    """The place of this process.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        local_rank: Number of this process on its machine.
        local_world_size: Processes on this machine; None where the launcher does not say.
        master_address: Host of rank 0.
        master_port: Port on which rank 0 gathers the others.
        launcher: Who started the process.
        spare_ports: Where rank 0 gathers the others if something else has ``master_port``.
        job: What no other run on these machines has at the same time, as far as variables tell.
        agent_store: Whether torchrun's agent keeps a store at ``master_port`` for all processes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    master_address: str
    master_port: int
    launcher: Literal["torchrun", "slurm", "single"]
    spare_ports: tuple[int, ...] = ()
    job: str = ""
    agent_store: bool = False

    @property
    def ports(self) -> tuple[int, ...]:
        """On which rank 0 may be, in the order in which it tries."""
        return (self.master_port, *self.spare_ports)

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self:
        """Read the variables: torchrun's where there are any, else srun's, else one process.

        ``MASTER_ADDR`` and ``MASTER_PORT`` win over what is derived from Slurm's variables.

        Raises:
            ConfigError: A variable is missing, is no number, or contradicts another one.
        """
        if "RANK" in environ or "WORLD_SIZE" in environ:
            found = cls._torchrun(environ)
        elif _started_by_srun(environ):
            found = cls._slurm(environ)
        else:
            found = cls(0, 1, 0, 1, "127.0.0.1", _port(environ, 29500), "single")
        if not 0 <= found.rank < found.world_size or found.local_rank < 0:
            raise ConfigError(
                f"{found.launcher}'s variables contradict each other: rank {found.rank} of "
                f"{found.world_size}, local rank {found.local_rank}; start the run again with one "
                "launcher, in a shell without left-over RANK or SLURM variables"
            )
        return found

    @classmethod
    def _torchrun(cls, environ: Mapping[str, str]) -> Self:
        world_size = _number(environ, "WORLD_SIZE")
        if world_size > 1 and "MASTER_ADDR" not in environ:
            raise ConfigError(
                f"MASTER_ADDR is not set, but WORLD_SIZE is {world_size}; start with torchrun, or "
                "set it to the host of rank 0"
            )
        local = environ.get("LOCAL_WORLD_SIZE")
        return cls(
            rank=_number(environ, "RANK"),
            world_size=world_size,
            local_rank=_number(environ, "LOCAL_RANK"),
            local_world_size=None if local is None else _number(environ, "LOCAL_WORLD_SIZE"),
            master_address=environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_port(environ, 29500),
            launcher="torchrun",
            job=environ.get("TORCHELASTIC_RESTART_COUNT", ""),
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    @classmethod
    def _slurm(cls, environ: Mapping[str, str]) -> Self:
        nodes = nodes_of(environ)
        world_size = _number(environ, _tasks_variable(environ))
        address = environ.get("MASTER_ADDR") or (first_host(nodes) if nodes else None)
        if address is None:
            if world_size > 1:
                raise ConfigError(
                    f"Slurm's variables name {world_size} tasks but no nodes (SLURM_STEP_NODELIST, "
                    "SLURM_JOB_NODELIST); start with srun, or set MASTER_ADDR to the host of rank 0"
                )
            address = "127.0.0.1"
        job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
        restarts = environ.get("SLURM_RESTART_COUNT", "0")
        # 3989 is prime, so that the ports of jobs with neighbouring ids do not follow each other.
        derived = [
            _FIRST_PORT + (int(job) * 13 + int(step) + 3989 * spare) % _PORTS
            for spare in range(1 + _SPARE_PORTS)
        ]
        given = "MASTER_PORT" in environ
        return cls(
            rank=_number(environ, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_world_size=_local_tasks(environ),
            master_address=address,
            master_port=_port(environ, derived[0]),
            launcher="slurm",
            spare_ports=() if given else tuple(derived[1:]),
            job=f"job {job}, step {step}, restart {restarts}",
        )


def is_first_process(environ: Mapping[str, str]) -> bool:
    """Whether this is rank 0, by what launchers set; needs no valid environment."""
    return environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"


def host_of(environ: Mapping[str, str]) -> str:
    """This machine's name, as Slurm's options take it where it is Slurm's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def nodes_of(environ: Mapping[str, str]) -> str | None:
    """The nodes of this step in Slurm's short form."""
    return environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")


def first_host(nodelist: str) -> str:
    """First host of Slurm's short form: ``gpu[003-006,9],login1`` gives ``gpu003``."""
    depth, first = 0, ""
    for character in nodelist.strip():
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            break
        first += character
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _tasks_variable(environ: Mapping[str, str]) -> str:
    """srun's own count where there is one: SLURM_NTASKS may be that of the whole allocation."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _started_by_srun(environ: Mapping[str, str]) -> bool:
    if "SLURM_PROCID" not in environ:
        return False
    step = environ.get("SLURM_STEP_ID")
    if step is None:
        inside = "SLURM_JOB_ID" not in environ
    else:
        inside = not step.isdigit() or int(step) < _FIRST_SPECIAL_STEP
    if not inside and environ.get("SLURM_NTASKS", "1") != "1":
        _log.warning(
            "the Slurm job has %s tasks, but this process was not started by srun: it runs alone",
            environ["SLURM_NTASKS"],
        )
    return inside


def _local_tasks(environ: Mapping[str, str]) -> int | None:
    """Tasks of this step on this node, from ``SLURM_STEP_TASKS_PER_NODE`` such as ``4(x2),3``."""
    text, node = environ.get("SLURM_STEP_TASKS_PER_NODE"), environ.get("SLURM_NODEID")
    if text is None or node is None:
        return None
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[int(node)] if int(node) < len(counts) else None


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        raise ConfigError(
            f"{name} is not set, though other variables of the launcher are; start with torchrun "
            "or srun, or unset RANK, WORLD_SIZE and SLURM_PROCID to run one process"
        ) from None
    except ValueError:
        raise ConfigError(f"{name} = {environ[name]!r} must be a whole number") from None


def _port(environ: Mapping[str, str], default: int) -> int:
    if "MASTER_PORT" not in environ:
        return default
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT = {port} must be between 1 and 65535")
    return port
