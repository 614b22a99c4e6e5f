"""Whether all ranks see what rank 0 writes into the run folder, and how fast it writes."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from soar_mega.launch.findings import Finding, ranks_at
from soar_mega.launch.mounts import file_system_of, local_file_system

_SPEED_BYTES = 64 * 2**20
_MOUNTS = Path("/proc/mounts")


class Token:
    """A small file with random content, and the run folder made for it; removed by ``remove``.

    Args:
        folder: ``run.dir``.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.value = folder, secrets.token_hex(16)
        self.name = f".doctor-{self.value[:8]}"
        self._write(self.name, self.value.encode())

    def write_speed(self) -> float:
        """Bytes a second that this process writes until they are safe.

        Raises:
            OSError: It cannot be written.
        """
        data = os.urandom(_SPEED_BYTES)  # file systems compress zeros
        name = self.name + "-speed"
        began = time.perf_counter()
        try:
            self._write(name, data)
            return len(data) / (time.perf_counter() - began)
        finally:
            (self._folder / name).unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        with (self._folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Leave the disk as it was."""
        with suppress(OSError):
            (self._folder / self.name).unlink(missing_ok=True)
        for path in self._made:
            with suppress(OSError):
                path.rmdir()


def problem_of_token(folder: Path, name: str, value: str, seconds: float) -> str | None:
    """Why this process does not see rank 0's file; None: it does.

    Args:
        folder: ``run.dir``.
        name, value: The file and what it holds.
        seconds: How long a network file system may take to show it.
    """
    path, deadline = folder / name, time.monotonic() + seconds
    while True:
        try:
            # A listing makes NFS look anew where it remembers that there was no such file.
            os.listdir(folder)
            found = path.read_text()
            problem = None if found == value else f"{path} has other content than rank 0 wrote"
        except OSError as error:
            problem = f"{path} is not there ({error.strerror or error})"
        if problem is None or time.monotonic() > deadline:
            return problem
        time.sleep(0.2)


def where_is(folder: Path) -> dict[str, Any]:
    """The file system of a folder: ``words`` for it, and whether it is ``local`` to one node."""
    mounts = _MOUNTS.read_text() if _MOUNTS.exists() else ""
    point, kind = file_system_of(folder, mounts)
    return {"words": f"{kind} at {point}", "local": local_file_system(folder, mounts) is not None}


def token_findings(
    problems: Mapping[int, str | None], hosts: Sequence[str], folder: str, home: Mapping[str, Any]
) -> Finding:
    """Whether the run folder is one and the same for all.

    Args:
        problems: By rank, as ``problem_of_token`` tells them.
        hosts: Of every rank.
        folder: ``run.dir``.
        home: ``where_is`` of it on rank 0.
    """
    blind = [rank for rank, problem in problems.items() if problem is not None]
    if not blind:
        seen = f" and seen by all {len(problems)} ranks" if len(problems) > 1 else ""
        return Finding("ok", f"storage: run.dir = {folder} ({home['words']}) is writable{seen}")
    lead = f"storage: run.dir = {folder}: what rank 0 writes, {ranks_at(blind, hosts)}"
    if home["local"] and len(set(hosts)) > 1:
        return Finding(
            "PROBLEM",
            f"{lead} cannot see: it lies on {home['words']}, which only {hosts[0]} sees",
            "set run.dir to a folder on storage that all nodes share",
            cause="input",
        )
    return Finding(
        "PROBLEM",
        f"{lead} cannot see: {problems[blind[0]]}; on rank 0 it lies on {home['words']}",
        "see whether that file system is mounted on those nodes (mount, df); leave a node without "
        "it out (sbatch --exclude)",
    )


def clock_findings(offsets: Mapping[int, float], hosts: Sequence[str]) -> Iterator[Finding]:
    """Whether the clocks agree well enough for times in logs and on files to be compared.

    Args:
        offsets: Seconds by which each rank's clock is ahead of rank 0's.
        hosts: Of every rank.
    """
    if len(set(hosts)) < 2:
        return
    by_host = {hosts[rank]: offset for rank, offset in offsets.items()}
    off = {host: offset for host, offset in by_host.items() if abs(offset) > 3}
    if off:
        words = [f"{host} {offset:+.1f} s" for host, offset in off.items()]
        text = f"clocks: off from rank 0's by more than 3 s: {', '.join(words)}; start chrony there"
        yield Finding("note", text)
    else:
        most = max(map(abs, by_host.values()))
        yield Finding("ok", f"clocks: all within {most:.1f} s")
