"""Where the processes of a run find each other: a store that rank 0 keeps.

Slurm gives no port. One follows from the job's id, so all ranks know it before they have talked; if
something else sits on it, rank 0 takes the next of a short list and the others look for it there. A
store says whose it is, as another job's may sit on one of these ports.
"""

from __future__ import annotations

import logging
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from soar_mega.launch.bounded import bounded
from soar_mega.launch.environment import ProcessEnvironment

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_OWNER = "soar_mega/owner"
_TRY_S, _PAUSE_S = 3.0, 0.2

_log = logging.getLogger(__name__)


class RendezvousError(RuntimeError):
    """Rank 0 cannot listen, or this process does not find it.

    Attributes:
        fix: What to do about it.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def open_store(process: ProcessEnvironment, limit: timedelta) -> TCPStore:
    """Keep the store on rank 0; connect to it on all others, and to that of torchrun's agent.

    Args:
        process: Place of this process.
        limit: Longest wait for rank 0, and for whatever the store is asked later.

    Raises:
        RendezvousError: No port is free, or rank 0 does not come.
    """
    if process.rank == 0 and not process.agent_store:
        return _listen(process, limit)
    return _find(process, limit)


def _listen(process: ProcessEnvironment, limit: timedelta) -> TCPStore:
    from torch.distributed import TCPStore

    for port in process.ports:
        try:
            # It listens on every address; rank 0 need not be found by its name.
            store = TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=limit
            )
        except RuntimeError as error:
            _log.warning("port %d of rank 0's host is taken: %s", port, _first_line(error))
            continue
        store.set(_OWNER, process.job)
        return store
    raise RendezvousError(
        f"rank 0 cannot listen on {' or '.join(map(str, process.ports))} of its host: in use",
        "see who has it (ss -ltnp), or set MASTER_PORT to a free one",
    )


def _find(process: ProcessEnvironment, limit: timedelta) -> TCPStore:
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        problems = []
        for port in process.ports:
            try:
                return _connect(process, port, limit)
            except (OSError, RuntimeError) as error:
                problems.append(f"{port}: {_first_line(error)}")
        if time.monotonic() > deadline:
            raise RendezvousError(
                f"process {process.rank} does not find rank 0 on {process.master_address} "
                f"({'; '.join(problems)})",
                "see whether rank 0 runs and what it says; tools/doctor.py, started as the run is, "
                "finds out more",
            )
        time.sleep(_PAUSE_S)


def _connect(process: ProcessEnvironment, port: int, limit: timedelta) -> TCPStore:
    """The store on that port, if it is this job's."""
    from torch.distributed import TCPStore

    host = process.master_address
    # torch tries for as long as its timeout where nobody listens (yet).
    with socket.create_connection((host, port), timeout=_TRY_S):
        pass

    def ask() -> tuple[TCPStore, str]:
        brief = timedelta(seconds=_TRY_S)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=brief)
        return store, "" if process.agent_store else store.get(_OWNER).decode()

    store, owner = bounded(ask, 2 * _TRY_S)
    if owner != process.job:
        raise RuntimeError(f"the store of another run ({owner or 'unnamed'})")
    store.set_timeout(limit)
    return store


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
