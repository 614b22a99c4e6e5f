"""Means over seeds and paired differences, with 95 % intervals of Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; NaN ends where one value gives none."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, one a seed.

    Raises:
        ValueError: No values.
    """
    from scipy.stats import t

    if not values:
        raise ValueError("a mean of no values: give at least one seed")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = float(t.ppf(0.5 + _LEVEL / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return Estimate(mean, mean - reach, mean + reach)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """``first`` minus ``second``, seed by seed.

    Raises:
        ValueError: Not the same number of seeds.
    """
    return estimate([one - other for one, other in zip(first, second, strict=True)])
