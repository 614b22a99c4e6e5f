"""What can be wrong with training data."""

from __future__ import annotations

# Bad samples are counted by these; their places in the list are codes that ranks exchange.
BAD_KINDS = (
    "not an image",
    "truncated or damaged image",
    "too many pixels",
    "too many bytes",
    "unreadable",
    "no caption",
    "caption not UTF-8",
    "damaged payload",
)


class DataError(ValueError):
    """Training data that cannot be used; the message names what, where, the rule and the fix."""


class TooManyBadSamplesError(DataError):
    """More of a run's samples cannot be used than may be; raised on every rank alike."""


class BadSampleError(DataError):
    """One sample that cannot be used while the rest of its set can.

    Args:
        kind: A few words that such samples are counted by; in training one of ``BAD_KINDS``.
        message: Where the sample lies, what is wrong with it and what to do.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def code(self) -> int:
        """1 + the place of its kind in ``BAD_KINDS``."""
        return 1 + BAD_KINDS.index(self.kind)
