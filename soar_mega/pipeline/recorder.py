"""When a real step's actions began and ended, for the same pictures as the simulator's.

Times are seconds of the wall clock, so that the ranks of one machine agree exactly and those of
several as well as their clocks do. On a GPU they are of the stream, by events.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from soar_mega.pipeline.actions import Action
from soar_mega.pipeline.timeline import Event


class NoRecorder:
    """Records nothing."""

    def time(self, action: Action) -> AbstractContextManager[None]:
        return nullcontext()


class Recorder:
    """Times every action of one step on one rank.

    Args:
        device: Whose time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Action, Any, Any]] = []
        if self._cuda:
            torch.cuda.synchronize(device)
        self._since, self._first = time.time(), self._mark()

    @contextmanager
    def time(self, action: Action) -> Iterator[None]:
        """Context of an action; on a CPU its end is the end of the work."""
        start = self._mark()
        yield
        self._marks.append((action, start, self._mark()))

    def events(self) -> list[Event]:
        """What was recorded; on a GPU waits for it."""
        if self._cuda:
            torch.cuda.synchronize()
        return [Event(a, self._time(start), self._time(end)) for a, start, end in self._marks]

    def _mark(self) -> Any:
        if not self._cuda:
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _time(self, mark: Any) -> float:
        if not self._cuda:
            return float(mark)
        return self._since + float(self._first.elapsed_time(mark)) / 1000
