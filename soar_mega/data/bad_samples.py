"""Counts samples that cannot be used, and stops a run that has too many.

Legend: K kinds of bad samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from soar_mega.data.errors import BAD_KINDS, DataError, TooManyBadSamplesError

# A rate of fewer samples than this says little: one bad picture among the first eight is 12 %.
_LEAST_SAMPLES = 1000


class BadSampleCount:
    """How many samples of a run could not be used; the same on every rank.

    Args:
        max_rate: Largest share of the run's samples, of 1000 at least.
        folder: Where they are listed, for the message.
        record: What ``to_json`` gave, to go on from.

    Raises:
        DataError: ``record`` is damaged.
    """

    def __init__(self, max_rate: float, folder: Path, record: object = None) -> None:
        self._max_rate, self._folder = max_rate, folder
        self.seen = 0
        self.by_kind = dict.fromkeys(BAD_KINDS, 0)
        if record is not None:
            try:
                assert isinstance(record, dict)
                self.seen = record["seen"]
                self.by_kind |= {kind: record["bad"].get(kind, 0) for kind in BAD_KINDS}
                numbers = [self.seen, *self.by_kind.values()]
                # JSON of the same look may hold 1.5, true, -1 or Infinity.
                assert all(type(number) is int and number >= 0 for number in numbers)
                assert self.total <= self.seen
            except (AssertionError, AttributeError, KeyError, TypeError) as error:
                raise DataError(f"the saved count of samples is damaged: {record!r}") from error

    @property
    def total(self) -> int:
        """Bad samples so far."""
        return sum(self.by_kind.values())

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"seen": self.seen, "bad": {k: n for k, n in self.by_kind.items() if n}}

    def add(self, samples: int, bad_K: Tensor) -> None:
        """Count a step's.

        Args:
            samples: Of the global batch.
            bad_K: Of the global batch, by ``BAD_KINDS``.

        Raises:
            TooManyBadSamplesError: There are too many.
        """
        self.seen += samples
        for kind, number in zip(BAD_KINDS, bad_K.tolist(), strict=True):
            self.by_kind[kind] += int(number)
        if self.total > self._max_rate * max(self.seen, _LEAST_SAMPLES):
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.by_kind.items() if n)
            raise TooManyBadSamplesError(
                f"data.max_bad_rate = {self._max_rate:g}: {self.total} of the run's {self.seen} "
                f"samples could not be used ({kinds}), more than that share of "
                f"{max(self.seen, _LEAST_SAMPLES)}. They are listed in {self._folder}. Repair the "
                "shards (tools/inspect_data.py --verify finds all), or raise the rate."
            )
