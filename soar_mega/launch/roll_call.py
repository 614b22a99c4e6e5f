"""All processes of a job meet at rank 0 and answer its questions; whoever does not come is named.

What they say goes through a TCPStore, as JSON: no process group is needed to find out why there can
be none. Every wait has an end.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.findings import Finding

if TYPE_CHECKING:
    from torch.distributed import Store

Answer = TypeVar("Answer")
_TRY_S, _PAUSE_S = 5.0, 0.3
BEAT_S = 2.0  # seconds between two signs of life
_FAREWELL_S = 5.0


class MeetingError(RuntimeError):
    """This process cannot meet the others.

    Attributes:
        finding: Why, and what to do.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


class LostRank0Error(RuntimeError):
    """Rank 0 is gone, or said nothing for too long."""


class RollCall:
    """What a process says to rank 0 and hears from it.

    Args:
        connect: Makes a connection to the store that all ranks share. Each is for one thread.
        rank, world_size: Place of this process.

    Attributes:
        silent: Ranks that owe rank 0 an answer; it does not wait for them again.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, world_size: int) -> None:
        self.connect = connect
        self._store = connect()
        self._rank, self._world_size = rank, world_size
        self.silent: set[int] = set()

    def beat(self) -> None:
        """A sign of life while this rank works on its answer.

        Raises:
            LostRank0Error: Rank 0 is gone.
        """
        _heard("sign of life", lambda: self._store.add(f"alive/{self._rank}", 1), _TRY_S)

    def collect(
        self, topic: str, answer: Any, deadline: float, quiet_s: float = math.inf
    ) -> dict[int, Any]:
        """Every rank's answer by rank, on rank 0; on others, which only send theirs, nothing.

        Args:
            topic: Each is asked once.
            answer: This rank's, ready for JSON.
            deadline: Of rank 0's wait, as ``time.monotonic`` counts.
            quiet_s: Longest that it waits for a rank without a new ``beat``.

        Raises:
            LostRank0Error: It is gone.
        """
        key = f"{topic}/{self._rank}"
        _heard(topic, lambda: self._store.set(key, json.dumps(answer)), _TRY_S)
        if self._rank:
            return {}
        answers = {}
        for rank in range(self._world_size):
            if rank in self.silent:
                continue
            key = f"{topic}/{rank}"
            if self._comes(key, rank, deadline, quiet_s):
                answers[rank] = json.loads(self._store.get(key))
            else:
                self.silent.add(rank)
        return answers

    def _comes(self, key: str, rank: int, deadline: float, quiet_s: float) -> bool:
        beats, heard = -1, time.monotonic()
        while True:
            left = min(deadline - time.monotonic(), BEAT_S)
            try:
                self._store.wait([key], timedelta(seconds=max(left, 0.01)))
                return True
            except RuntimeError:
                now = time.monotonic()
            count = self._store.add(f"alive/{rank}", 0)
            if count != beats:
                beats, heard = count, now
            if now > min(deadline, heard + quiet_s):
                return False

    def share(self, topic: str, value: Any, seconds: float) -> Any:
        """Rank 0's value on every rank.

        Raises:
            LostRank0Error: It did not come within ``seconds``.
        """
        if self._rank == 0:
            _heard(topic, lambda: self._store.set(topic, json.dumps(value)), _TRY_S)
            return value

        def wait() -> Any:
            self._store.wait([topic], timedelta(seconds=seconds))
            return json.loads(self._store.get(topic))

        return _heard(topic, wait, seconds + _TRY_S)

    def part(self, code: int | None, seconds: float) -> int:
        """The end: rank 0's exit code on every rank. Rank 0 has the store, so it leaves last.

        Raises:
            LostRank0Error: The code did not come within ``seconds``.
        """
        agreed = int(self.share("exit code", code, seconds))
        others = self._world_size - 1 - len(self.silent)
        if self._rank:
            _heard("exit code", lambda: self._store.add("left", 1), _TRY_S)
            return agreed
        deadline = time.monotonic() + _FAREWELL_S
        while self._store.add("left", 0) < others and time.monotonic() < deadline:
            time.sleep(0.05)
        return agreed


def _heard(topic: str, work: Callable[[], Answer], seconds: float) -> Answer:
    """What the store answers; torch bounds a wait for a key, but not for a host that is gone.

    Raises:
        LostRank0Error: There is no answer.
    """
    try:
        return bounded(work, seconds)
    except (RuntimeError, TimeoutError) as error:
        first = str(error).splitlines()[0].split(". ")[0]
        raise LostRank0Error(f"{topic}: {first}") from error


def bounded(
    work: Callable[[], Answer], seconds: float, meanwhile: Callable[[], None] | None = None
) -> Answer:
    """What ``work`` returns or raises; it is left behind in its thread if it takes too long.

    Drivers, file systems and collectives hang where no signal reaches them. A program that used
    this must end with ``os._exit``.

    Args:
        work: Runs in a thread of its own.
        seconds: How long it may take.
        meanwhile: Called every ``BEAT_S`` seconds until then.

    Raises:
        TimeoutError: It took longer.
    """
    done: list[Answer] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        thread.join(min(left, BEAT_S))
        if not thread.is_alive():
            break
        if meanwhile is not None:
            meanwhile()
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"it took longer than {seconds:g} s")
    return done[0]


def host_of(environ: Mapping[str, str]) -> str:
    """This machine's name, as Slurm's options take it where it is Slurm's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def meet(process: ProcessEnvironment, environ: Mapping[str, str], limit_s: float) -> RollCall:
    """Connect to rank 0; on rank 0, be there for the others.

    Args:
        process: Place of this process.
        environ: The launcher's variables.
        limit_s: Longest wait for rank 0.

    Raises:
        MeetingError: Rank 0's port is taken, or this process cannot reach rank 0 in time.
    """
    # Its stack traces of each failed try would bury what is said here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    import torch.distributed as dist

    deadline, host = time.monotonic() + limit_s, host_of(environ)
    if process.world_size == 1:
        alone = dist.HashStore()
        return RollCall(lambda: alone, 0, 1)
    address, port = process.master_address, process.master_port
    # torchrun's agent keeps a store at that port, for all of its processes.
    of_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = process.rank == 0 and not of_agent
    if serves and (problem := port_problem(port)):
        raise MeetingError(taken_port(port, host, problem))
    if not serves:
        _reach(process, host, deadline)
    served: list[Store] = []  # rank 0's first one is the server

    def connect() -> Store:
        store = dist.TCPStore(
            # It listens on every address: rank 0 need not be found by its name.
            "127.0.0.1" if serves else address,
            port,
            is_master=serves and not served,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(deadline - time.monotonic(), _TRY_S)),
        )
        served.append(store)
        return dist.PrefixStore(f"doctor/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    try:
        return RollCall(connect, process.rank, process.world_size)
    except RuntimeError as error:
        what = f"something answers, but not as rank 0 does ({str(error).splitlines()[0]})"
        raise MeetingError(_unreachable(process, host, [], what)) from error


def port_problem(port: int) -> str | None:
    """Why nobody can listen on this machine's port; None: somebody can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return None


def taken_port(port: int, host: str, problem: str) -> Finding:
    """What to say of a rendezvous port that rank 0 cannot listen on."""
    return Finding(
        "PROBLEM",
        f"port: rank 0 on {host} cannot listen on port {port} (MASTER_PORT): {problem}",
        f"see who has it (ss -ltnp 'sport = :{port}'), or set MASTER_PORT to a free port",
    )


def _reach(process: ProcessEnvironment, host: str, deadline: float) -> None:
    """Wait until rank 0's port takes connections.

    Raises:
        MeetingError: It does not in time; with the likely reason.
    """
    where = (process.master_address, process.master_port)
    addresses: list[str] = []
    problem: OSError | None = None
    while True:
        try:
            addresses = resolve(process.master_address)
            left = deadline - time.monotonic()
            with socket.create_connection(where, timeout=max(min(left, _TRY_S), 0.1)):
                return
        except OSError as error:
            problem = error
        if time.monotonic() > deadline:
            raise MeetingError(unreachable(process, host, addresses, problem)) from problem
        time.sleep(_PAUSE_S)


def resolve(name: str) -> list[str]:
    """Addresses of a host.

    Raises:
        OSError: The name does not resolve.
    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def only_loopback(addresses: list[str]) -> bool:
    """Whether a name leads every machine that resolves it so to itself."""
    return bool(addresses) and all(
        ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses
    )


def address_problem(name: str) -> str | None:
    """What is wrong with rank 0's address, as rank 0 itself sees it; None: nothing.

    Args:
        name: ``master_address``.
    """
    try:
        addresses = resolve(name)
    except OSError as error:
        return f"{name} does not resolve on rank 0's host ({error.strerror or error})"
    shown = name if addresses == [name] else f"{name} ({', '.join(addresses)})"
    if only_loopback(addresses):
        return f"{shown} leads every node to itself, if it resolves there as it does here"
    if not any(map(_is_own, addresses)):
        return f"{shown} is another host than rank 0's"
    return None


def _is_own(address: str) -> bool:
    """Whether this machine has the address: nobody can bind to another one's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def unreachable(
    process: ProcessEnvironment, host: str, addresses: list[str], problem: OSError
) -> Finding:
    """Why this process does not reach rank 0.

    Args:
        process: Its place.
        host: Its machine.
        addresses: Of ``master_address``; none: it does not resolve.
        problem: Of the last try.
    """
    name = process.master_address
    # Nodes take ranks one after the other, so only on the first one the two numbers agree.
    elsewhere = process.rank != process.local_rank
    if isinstance(problem, socket.gaierror):
        what = f"the name {name} does not resolve here ({problem.strerror})"
        fix = "give this node the cluster's DNS or /etc/hosts, or set MASTER_ADDR to rank 0's "
        return _unreachable(process, host, addresses, what, fix + "address")
    if elsewhere and only_loopback(addresses):
        what = (
            f"the name {name} resolves to {', '.join(addresses)} here, which is this node itself "
            "and not rank 0's (Debian's /etc/hosts gives 127.0.1.1 to a node's own name)"
        )
        fix = "set MASTER_ADDR to rank 0's address in the cluster's network, or take the name off "
        return _unreachable(process, host, addresses, what, fix + "the 127.x line of /etc/hosts")
    if problem.errno == errno.ECONNREFUSED:
        what = "the connection is refused: nobody listens there"
        fix = (
            "see whether rank 0 runs and what it says; if it does, MASTER_ADDR must be its host, "
            "and a firewall must let this port through"
        )
        return _unreachable(process, host, addresses, what, fix)
    what = f"no answer ({problem.strerror or problem})"
    fix = (
        "a firewall between the nodes drops it, or the address is of a network this node is not "
        "in: open the ports between the nodes, or set MASTER_ADDR to an address of another network"
    )
    return _unreachable(process, host, addresses, what, fix)


def _unreachable(
    process: ProcessEnvironment,
    host: str,
    addresses: list[str],
    what: str,
    fix: str | None = None,
) -> Finding:
    at = f"{process.master_address}:{process.master_port}"
    if addresses and addresses != [process.master_address]:
        at += f" ({', '.join(addresses)})"
    return Finding(
        "PROBLEM",
        f"roll call: rank {process.rank} on {host} cannot reach rank 0 at {at}: {what}",
        fix or "set MASTER_PORT to a port that nothing else uses on rank 0's host",
    )
