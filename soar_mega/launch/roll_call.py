"""All processes of a job meet at rank 0 and answer its questions; whoever does not come is named.

What they say goes through a TCPStore, as JSON: no process group is needed to find out why there can
be none. Every wait has an end.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from soar_mega.launch.addresses import resolve, unreachable, unreachable_because
from soar_mega.launch.bounded import BEAT_S, Answer, bounded
from soar_mega.launch.environment import ProcessEnvironment, host_of
from soar_mega.launch.findings import Finding
from soar_mega.launch.rendezvous import RendezvousError, open_store

if TYPE_CHECKING:
    from torch.distributed import Store

_TRY_S = 5.0
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
        port: Of the store; 0 where there is none.

    Attributes:
        silent: Ranks that owe rank 0 an answer; it does not wait for them again.
    """

    def __init__(
        self, connect: Callable[[], Store], rank: int, world_size: int, port: int = 0
    ) -> None:
        self.connect, self.port = connect, port
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


def meet(process: ProcessEnvironment, environ: Mapping[str, str], limit_s: float) -> RollCall:
    """Connect to rank 0; on rank 0, be there for the others.

    Args:
        process: Place of this process.
        environ: The launcher's variables.
        limit_s: Longest wait for rank 0.

    Raises:
        MeetingError: Rank 0's ports are taken, or this process cannot reach rank 0 in time.
    """
    # Its stack traces of each failed try would bury what is said here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    import torch.distributed as dist

    if process.world_size == 1:
        alone = dist.HashStore()
        return RollCall(lambda: alone, 0, 1)
    host, limit = host_of(environ), timedelta(seconds=limit_s)
    try:
        found = open_store(process, limit)
    except RendezvousError as error:
        raise MeetingError(_why_not(process, host, error)) from error

    def connect() -> Store:
        store: Store = found
        if connected:
            # Rank 0 need not be found by its name; torchrun's agent may be on another host.
            address = found.host if process.rank == 0 else process.master_address
            store = dist.TCPStore(
                address, found.port, is_master=False, wait_for_workers=False, timeout=limit
            )
        connected.append(store)
        return dist.PrefixStore(f"doctor/{process.job}", store)

    connected: list[Store] = []
    return RollCall(connect, process.rank, process.world_size, found.port)


def _why_not(process: ProcessEnvironment, host: str, error: RendezvousError) -> Finding:
    """What to say of a rendezvous that failed."""
    if process.rank == 0:
        return Finding("PROBLEM", f"port: rank 0 on {host}: {error}", error.fix)
    addresses: list[str] = []
    try:
        addresses = resolve(process.master_address)
        where = (process.master_address, process.master_port)
        with socket.create_connection(where, timeout=_TRY_S):
            pass
    except OSError as problem:
        return unreachable(process, host, addresses, problem)
    what = f"something answers, but not as rank 0 does ({error})"
    return unreachable_because(process, host, addresses, what)
