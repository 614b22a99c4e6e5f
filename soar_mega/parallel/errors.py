"""What can go wrong between processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PeerError(RuntimeError):
    """Another process died, hangs or did not answer in time; the message says what was awaited."""


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Name what a collective was for in the error that a lost process causes.

    Raises:
        PeerError: In place of the RuntimeError of torch's backends.
    """
    try:
        yield
    except (PeerError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise PeerError(f"waiting for {what}: {reason(error)}") from error


def reason(error: RuntimeError) -> str:
    """The first line of a backend's error, without the place in its source."""
    return re.sub(r"^\[\S+\]\s*", "", str(error).splitlines()[0])
