"""``metrics.jsonl``: one JSON object a step, in one file for the whole life of a run.

A run that stops and resumes leaves the file an unbroken run would have left, apart from ``perf/*``:
lines after the checkpoint it resumes from are cut off, because those steps are done again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from soar_mega.telemetry.files import put_aside

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends one line a step; every line is on its way to the disk when :meth:`write` returns.

    Only one process of a run may hold it.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0) -> None:
        """Open ``<run_dir>/metrics.jsonl``.

        Args:
            run_dir: Folder of the run; made if missing.
            resume_step: Last step that is not done again: the step of the checkpoint, 0 for a fresh
                start. Lines of later steps, and a line that a kill left half written, are cut off;
                on a fresh start the whole file is put aside as ``metrics.<n>.jsonl`` instead.

        Raises:
            ValueError: ``resume_step`` is negative.
        """
        if resume_step < 0:
            raise ValueError(f"resume_step must be 0 or more, but is {resume_step}")
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = resume_step
        if self.path.exists() and self.path.stat().st_size:
            if resume_step == 0:
                put_aside(self.path)
            else:
                os.truncate(self.path, _length_up_to(self.path, resume_step))
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append ``{"step": step, **values}``; NaN and infinities become null.

        Args:
            step: Number of the step just done, from 1; must grow from call to call.
            values: Numbers (also 0-d tensors and numpy scalars), texts, and lists and mappings of
                them.

        Raises:
            ValueError: ``step`` does not grow, or ``values`` has a key ``step``.
            TypeError: A value is none of the above; the message names its key.
        """
        if step <= self.last_step:
            raise ValueError(f"step {step} comes after step {self.last_step} in {self.path}")
        if "step" in values:
            raise ValueError("values must not have a key 'step'")
        line = {"step": step} | {key: _plain(key, value) for key, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self.last_step = step

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of ``<run_dir>/metrics.jsonl``; a half-written last line is left out.

    Raises:
        FileNotFoundError: The run has no metrics.
    """
    lines = []
    for raw in (Path(run_dir) / FILE_NAME).read_bytes().splitlines(keepends=True):
        line = _parse(raw)
        if line is not None:
            lines.append(line)
    return lines


def _plain(key: str, value: Any) -> Any:
    """The value as JSON can hold it."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{key}.{name}", inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, inner) for inner in value]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _plain(key, value.item())
    raise TypeError(
        f"metric {key} must be a number, a text, or a list or mapping of them: {value!r}"
    )


def _parse(raw: bytes) -> dict[str, Any] | None:
    """One line, or None where a kill or a crash left something else."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _length_up_to(path: Path, last_step: int) -> int:
    """Bytes of the whole lines of steps up to ``last_step``."""
    length = 0
    with path.open("rb") as file:
        for raw in file:
            line = _parse(raw)
            if line is None or line["step"] > last_step:
                break
            length += len(raw)
    return length
