"""Waits that end, whatever it is that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")
BEAT_S = 2.0  # seconds between two signs of life


def bounded(
    work: Callable[[], Answer], seconds: float, meanwhile: Callable[[], None] | None = None
) -> Answer:
    """What ``work`` returns or raises; it is left behind in its thread if it takes too long.

    Drivers, file systems and collectives hang where no signal reaches them, and torch's store waits
    without end for an answer of something that is no store. A program that left something behind
    ends with ``os._exit``.

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
