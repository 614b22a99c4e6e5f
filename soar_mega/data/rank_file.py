"""JSON lines that every rank writes for itself: shared file systems do not append atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


class RankFile:
    """``<folder>/rank-<n>.jsonl``, made when there is a first line.

    A step that is done again after a resume writes its lines again: the last ones count.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"rank-{rank:05d}.jsonl"
        self._file: IO[str] | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line and hand it to the system."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a")  # noqa: SIM115  # as long as the run
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
