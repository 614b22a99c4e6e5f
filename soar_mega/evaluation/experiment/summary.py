"""Results of the experiment as numbers by arm, and as the tables of docs/soar_vs_sft.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from soar_mega.data.tiny.pages import KINDS
from soar_mega.evaluation.experiment.arms import PRIMARY, SAMPLINGS, Arm
from soar_mega.evaluation.experiment.statistics import Estimate, estimate, paired_difference

# Scorer and metric, in the tables' words.
METRICS = {
    "handwriting/correct": "correct",
    "handwriting_frechet/pixels": "Frechet, pixels",
    "handwriting_frechet/reader": "Frechet, reader",
}
BASE = "base"


class Results:
    """What ``tools/evaluate.py`` found, by sampling, label and metric.

    Args:
        found: By sampling's name, the content of its ``results.json``.
        seeds: Of every arm.

    Attributes:
        samplings: Those found, PRIMARY's among them.
    """

    def __init__(self, found: Mapping[str, Any], seeds: Sequence[int]) -> None:
        self._found, self.seeds = found, tuple(seeds)
        self.samplings = [sampling for sampling in SAMPLINGS if sampling.name in found]

    def value(self, sampling: str, label: str, metric: str, category: str | None = None) -> float:
        """One number; NaN where there was none (a distance of too few digits)."""
        scorer, name = metric.split("/")
        found = self._found[sampling]["scorers"][scorer]["models"][label][name]
        part = found["overall"] if category is None else found["categories"][category]
        return float("nan") if part["value"] is None else float(part["value"])

    def values(
        self, sampling: str, arm: Arm, metric: str, category: str | None = None
    ) -> list[float]:
        """One number a seed."""
        return [self.value(sampling, f"{arm.name}-{seed}", metric, category) for seed in self.seeds]

    def difference(
        self, first: Arm, second: Arm, sampling: str = PRIMARY[0], metric: str = PRIMARY[1]
    ) -> Estimate:
        """``first`` minus ``second``, paired by seed."""
        return paired_difference(
            self.values(sampling, first, metric), self.values(sampling, second, metric)
        )


def by_sampling(results: Results, arms: Sequence[Arm]) -> str:
    """Overall score and distances, one table a metric: a row an arm, a column a way to draw."""
    parts = []
    for metric, title in METRICS.items():
        head = [title, *(f"{s.name.replace('_', ' ')}" for s in results.samplings)]
        rows = [
            ["base", *(f"{results.value(s.name, BASE, metric):.3f}" for s in results.samplings)]
        ]
        for arm in arms:
            cells = [
                str(estimate(results.values(s.name, arm, metric))) if s.name in arm.drawn else ""
                for s in results.samplings
            ]
            rows.append([arm.title, *cells])
        parts.append(_markdown(head, rows))
    return "\n\n".join(parts)


def by_kind(results: Results, arms: Sequence[Arm], sampling: str = PRIMARY[0]) -> str:
    """The score of each kind of caption."""
    metric = PRIMARY[1]
    base = [f"{results.value(sampling, BASE, metric, kind):.3f}" for kind in KINDS]
    rows = [["base", *base]]
    for arm in arms:
        cells = [str(estimate(results.values(sampling, arm, metric, kind))) for kind in KINDS]
        rows.append([arm.title, *cells])
    return _markdown([f"correct, {sampling}", *KINDS], rows)


def differences(results: Results, first: Arm, others: Sequence[Arm]) -> str:
    """``first`` minus each other arm, by way to draw, paired by seed."""
    rows = list(_difference_rows(results, first, others))
    head = [
        f"{first.title} minus",
        "metric",
        *(s.name.replace("_", " ") for s in results.samplings),
    ]
    return _markdown(head, rows)


def _difference_rows(results: Results, first: Arm, others: Sequence[Arm]) -> Iterator[list[str]]:
    for other in others:
        for metric, title in METRICS.items():
            cells = []
            for sampling in results.samplings:
                if sampling.name not in other.drawn:
                    cells.append("")
                    continue
                cells.append(_bold(results.difference(first, other, sampling.name, metric)))
            yield [other.title, title, *cells]


def against(results: Results, arms: Sequence[Arm], controls: Sequence[Arm]) -> str:
    """Each arm minus each control, in every way the arm is drawn, paired by seed."""
    rows = [
        [
            arm.title,
            sampling.name.replace("_", " "),
            title,
            *(_bold(results.difference(arm, c, sampling.name, metric)) for c in controls),
        ]
        for arm in arms
        for sampling in results.samplings
        if sampling.name in arm.drawn
        for metric, title in METRICS.items()
    ]
    return _markdown(["", "drawn", "metric", *(f"minus {c.title}" for c in controls)], rows)


def _bold(found: Estimate) -> str:
    return f"**{found}**" if found.excludes_zero else str(found)


def headline(results: Results, first: Arm, others: Sequence[Arm]) -> str:
    """One sentence an opponent: the difference that was decided on beforehand."""
    lines = []
    for other in others:
        found = results.difference(first, other)
        verdict = f"the 95 % interval {'excludes' if found.excludes_zero else 'includes'} 0"
        if len(results.seeds) == 1:
            verdict = "one seed has no interval"
        equal = "" if other.steps == first.steps else ", equal compute"
        lines.append(f"{first.title} minus {other.title}{equal}: {found}: {verdict}")
    return "\n".join(lines)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
