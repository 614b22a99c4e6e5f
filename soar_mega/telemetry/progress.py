"""Progress on the console: a bar on a terminal, plain lines in a file or a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO


class Progress:
    """Shows how far a run is.

    Metrics go by their names in ``metrics.jsonl``: ``train/loss``, ``optim/grad_norm``,
    ``optim/lr``, ``perf/samples_per_s``; those that are missing are not shown.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        every: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start showing.

        Args:
            total: Steps of the whole run.
            start: Steps done before this process took over.
            every: Steps between plain lines; the last step has one always.
            stream: Where to show; standard output by default.
            clock: Seconds, for the time left.
        """
        self._total, self._start, self._every = total, start, every
        self._stream = stream if stream is not None else sys.stdout
        self._clock, self._began = clock, clock()
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True
            )

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show that ``step`` (from 1) is done."""
        parts = _shown(metrics)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str("  ".join(parts), refresh=False)
            return
        if step % self._every and step != self._total:
            return
        width = len(str(self._total))
        line = "  ".join([f"step {step:>{width}}/{self._total}", *parts, f"eta {self._eta(step)}"])
        self._stream.write(line + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """Show a line of text, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _eta(self, step: int) -> str:
        done = step - self._start
        if done <= 0:
            return "?"
        return format_duration((self._clock() - self._began) / done * (self._total - step))


def _shown(metrics: Mapping[str, Any]) -> list[str]:
    forms: list[tuple[str, Callable[[float], str]]] = [
        ("train/loss", "loss {:.4f}".format),
        ("optim/grad_norm", "grad_norm {:.2f}".format),
        ("optim/lr", lambda rate: f"lr {format_rate(rate)}"),
        ("perf/samples_per_s", "{:.1f} samples/s".format),
    ]
    return [form(float(metrics[key])) for key, form in forms if metrics.get(key) is not None]


def format_rate(value: float) -> str:
    """A learning rate in short: ``1e-4``, ``2.5e-5``, ``0``."""
    if value == 0:
        return "0"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def format_duration(seconds: float) -> str:
    """``0:12``, ``1:02:03``, ``2d 3:04:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
