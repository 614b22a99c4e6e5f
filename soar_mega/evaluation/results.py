"""Means of scores with 95 % intervals, overall and by category.

The interval is the percentile bootstrap over prompts (Efron, "Bootstrap methods: another look at
the jackknife", 1979): prompts are drawn again, each with all its pictures, because pictures of one
prompt are not independent. Where the overall score is the mean over categories, prompts are drawn
again within each. The draws are fixed, so the same scores give the same numbers.

Where all prompts score 0, or all 1, drawing them again tells nothing: the interval is then Wilson's
("Probable inference", 1927) for that many prompts. One prompt of another score has none.

Legend: N prompts, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from soar_mega.evaluation.scoring import PictureScores

CONFIDENCE = 0.95
RESAMPLES = 1000
_SEED = 0
_AT_ONCE = 2**22  # numbers drawn at a time


@dataclass(frozen=True)
class Estimate:
    """A mean.

    Attributes:
        value: Over pictures, or over categories; None: a set has none, see ``of_set``.
        low, high: Ends of the interval; None where there is none.
        prompts, pictures: Of how many.
    """

    value: float | None
    low: float | None
    high: float | None
    prompts: int
    pictures: int


def summarise(
    scores: PictureScores,
    categories: Sequence[str],
    *,
    overall: Literal["pictures", "categories"] = "pictures",
) -> dict[str, dict[str, Any]]:
    """Each metric's estimates as plain values: ``{"overall": ..., "categories": {name: ...}}``.

    Args:
        scores: Of each picture; a metric may be missing in some, which do not count for it.
        categories: Of each prompt; all empty: there are none.
        overall: What the overall value is a mean of; see ``Scorer``.
    """
    found = {}
    for metric in dict.fromkeys(name for one in scores.values() for name in one):
        sums, counts = _by_prompt(scores, metric, len(categories))
        groups: dict[str, list[int]] = {}
        for number in np.flatnonzero(counts).tolist():
            groups.setdefault(categories[number], []).append(number)
        parts = {name: (sums[own], counts[own]) for name, own in groups.items()}
        every = np.flatnonzero(counts)
        whole = list(parts.values()) if overall == "categories" else [(sums[every], counts[every])]
        named = {} if set(parts) == {""} else parts
        found[metric] = {
            "overall": asdict(_estimate(whole)),
            "categories": {name: asdict(_estimate([part])) for name, part in named.items()},
        }
    return found


def of_set(metrics: Mapping[str, float], prompts: int, pictures: int) -> dict[str, dict[str, Any]]:
    """The same for metrics of a whole set, which have no interval; NaN is none."""
    found = {}
    for metric, value in metrics.items():
        known = value if math.isfinite(value) else None
        overall = Estimate(known, None, None, prompts, pictures)
        found[metric] = {"overall": asdict(overall), "categories": {}}
    return found


def _by_prompt(scores: PictureScores, metric: str, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum over a prompt's pictures and how many have the metric, (N,) each."""
    sums, counts = np.zeros(prompts), np.zeros(prompts)
    for (number, _), values in scores.items():
        if metric in values:
            sums[number] += values[metric]
            counts[number] += 1
    return sums, counts


def _estimate(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate:
    """The mean over groups of each group's mean over pictures."""
    value = float(np.mean([sums.sum() / counts.sum() for sums, counts in groups]))
    rng = np.random.default_rng(_SEED)
    means_R = np.mean([_resampled(sums, counts, rng) for sums, counts in groups], axis=0)
    prompts, tail = sum(len(counts) for _, counts in groups), (1 - CONFIDENCE) / 2
    low, high = (float(end) for end in np.quantile(means_R, [tail, 1 - tail]))
    ends: tuple[float | None, float | None] = low, high
    if low == high and value in (0.0, 1.0):
        ends = _wilson(value, prompts)
    elif prompts == 1:
        ends = None, None
    return Estimate(
        value=value,
        low=ends[0],
        high=ends[1],
        prompts=prompts,
        pictures=int(sum(counts.sum() for _, counts in groups)),
    )


def _wilson(value: float, prompts: int) -> tuple[float, float]:
    """The interval of all or none of so many."""
    z2 = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2) ** 2
    far = prompts / (prompts + z2)
    return (0.0, 1 - far) if value == 0 else (far, 1.0)


def _resampled(sums_N: np.ndarray, counts_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(R,) means, each over as many prompts as there are, drawn again."""
    prompts = len(sums_N)
    rows = max(1, _AT_ONCE // prompts)
    parts = []
    for start in range(0, RESAMPLES, rows):
        drawn_RN = rng.integers(prompts, size=(min(rows, RESAMPLES - start), prompts))
        parts.append(sums_N[drawn_RN].sum(axis=1) / counts_N[drawn_RN].sum(axis=1))
    return np.concatenate(parts)
