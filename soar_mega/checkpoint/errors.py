"""The errors of this room."""

from __future__ import annotations

import errno
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint or model folder cannot be used; the message says which, why and what to do."""


class DiskFullError(CheckpointError):
    """A checkpoint could not be written because there is no room, or no quota, for it."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk or the user's quota is full."""
    return isinstance(error, DiskFullError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    )


def listing(title: str, items: Iterable[str]) -> str:
    """``title`` and every item on a line of its own; empty without items."""
    lines = sorted(items)
    return f"\n  {title} ({len(lines)}):\n    " + "\n    ".join(lines) if lines else ""
