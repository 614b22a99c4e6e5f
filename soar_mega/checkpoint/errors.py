"""The error of this room."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint or model folder cannot be used; the message says which, why and what to do."""


def listing(title: str, items: Iterable[str]) -> str:
    """``title`` and every item on a line of its own; empty without items."""
    lines = sorted(items)
    return f"\n  {title} ({len(lines)}):\n    " + "\n    ".join(lines) if lines else ""
