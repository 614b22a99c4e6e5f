"""Ends a process that makes no progress, after writing down where each of its threads stands.

A collective that never returns, a file system that does not answer, a loader that sleeps: nobody
gets an exception. So a thread looks at the time of the last sign of life. When the phase's limit is
over it writes the stacks; a little later, so that every rank has had time to write its own before
the first one's end breaks the connections, the process ends with exit code 1.

The end itself is faulthandler's, whose thread is not Python: it comes even when the interpreter
hangs with its lock held, or the folder of the stacks is on the file system that does not answer.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from soar_mega.config.schema import WatchdogConfig

Phase = Literal["start", "step", "validation", "save"]
FOLDER = "stacks"
GRACE_S = 15.0  # between the stacks and the end


class Watchdog:
    """Watches the main thread of one rank; a context manager.

    Args:
        settings: Limits in minutes.
        folder: Stacks go to ``<folder>/stacks``.
        rank: Of this process.
    """

    def __init__(self, settings: WatchdogConfig, folder: Path, rank: int) -> None:
        self._limits: dict[Phase, float] = {
            "start": settings.start_minutes,
            "step": settings.step_minutes,
            "validation": settings.validation_minutes,
            "save": settings.save_minutes,
        }
        self._folder, self._rank = folder / FOLDER, rank
        self._phase: Phase = "start"
        self._since = time.monotonic()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.enter("start")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def enter(self, phase: Phase) -> None:
        """The main thread begins a phase: its whole limit is ahead."""
        with self._changed:
            self._phase, self._since = phase, time.monotonic()
            limit_s = 60 * self._limits[phase]
            self._changed.notify()
        faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=2)

    def alive(self) -> None:
        """The main thread got on within its phase."""
        self.enter(self._phase)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._since + 60 * self._limits[self._phase] - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._write()
                since = self._since
                while not self._closed and self._since == since:  # once for each hang
                    self._changed.wait()

    def _write(self) -> None:
        """The stacks of all threads, to this rank's file."""
        path = self._folder / f"rank-{self._rank:05d}.txt"
        limit = f"watchdog.{self._phase}_minutes = {self._limits[self._phase]:g}"
        lead = f"rank {self._rank} on {socket.gethostname()}: no sign of life in {limit}"
        try:
            sys.stderr.write(
                f"error: {lead}; stacks of its threads: {path}. The process ends in {GRACE_S:g} s\n"
            )
            sys.stderr.flush()
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {lead} (pid {os.getpid()})\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            sys.stderr.write(f"the stacks could not be written: {error}\n")
