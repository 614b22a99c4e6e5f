"""What can go wrong between processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PeerError(RuntimeError):
    """Another process died, hangs or did not answer in time; the message says what was awaited."""


class CollectiveError(PeerError):
    """The other process is missing in a collective."""


# RuntimeErrors that are this process's own.
_OWN_ERRORS = (PeerError, torch.OutOfMemoryError, torch.AcceleratorError, NotImplementedError)


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Name what a collective was for in the error that a lost process causes.

    Raises:
        CollectiveError: In place of the RuntimeError of torch's backends.
    """
    try:
        yield
    except _OWN_ERRORS:
        raise
    except RuntimeError as error:
        raise CollectiveError(f"waiting for {what}: {reason(error)}") from error


def reason(error: RuntimeError) -> str:
    """The first sentence of a backend's error, without the place in its source."""
    first = (str(error).splitlines() or [repr(error)])[0].split(". ")[0]
    return re.sub(r"^\[\S+\]\s*", "", first)
