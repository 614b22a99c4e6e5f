"""What can be wrong with training data."""

from __future__ import annotations


class DataError(ValueError):
    """Training data that cannot be used; the message names what, where, the rule and the fix."""


class BadSampleError(DataError):
    """One sample that cannot be used while the rest of its set can.

    Args:
        kind: One of a few short names; bad samples are counted by it.
        message: Where the sample lies, what is wrong with it and what to do.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
