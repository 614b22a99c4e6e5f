"""Signals that ask a run to save and end: before a preemption, at the end of a job's time.

A handler only notes that the signal came. The ranks agree on it between two steps, because one that
saved on its own would wait for the others in the middle of theirs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

# USR1 is what `sbatch --signal=USR1@300` sends, USR2 the same where a library wants USR1 itself.
# TERM is Slurm's before KILL (KillWait), INT a person's Ctrl-C.
ASKING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
LEAD_VARIABLE = "SOAR_MEGA_SIGNAL_LEAD_S"


class Signals:
    """Notes which signal asked this process to end.

    Attributes:
        received: Name of the first one (``SIGUSR1``), or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take over the signals, until ``close``; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in ASKING:
            self._before[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        again = self.received is not None
        self.received = self.received or name
        if number == signal.SIGINT:
            if again:
                raise KeyboardInterrupt
            text = f"{name}: saving after this step; once more ends at once, without saving\n"
            os.write(2, text.encode())  # print is not safe in a handler


def signal_lead(environ: Mapping[str, str]) -> float | None:
    """Seconds between the signal and the end of the job, where the job script tells them."""
    try:
        return float(environ[LEAD_VARIABLE])
    except (KeyError, ValueError):
        return None
