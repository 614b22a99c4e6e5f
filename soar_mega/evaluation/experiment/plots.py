"""The plots of docs/soar_vs_sft.md, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soar_mega.evaluation.experiment.arms import PRIMARY, Arm
from soar_mega.evaluation.experiment.statistics import estimate
from soar_mega.evaluation.experiment.summary import BASE, METRICS, Results

_COLOURS = ("#6b7280", "#2563b0", "#c4386c", "#10917a", "#d98324", "#7c5cc4")
_DPI = 150


def plot_scores(results: Results, arms: Sequence[Arm], path: Path) -> None:
    """A panel a metric, a group a way to draw, a bar an arm with its interval, a dot a seed."""
    figure, panels = _panels(len(METRICS), width=4.4, height=3.6)
    for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for place, arm in enumerate(arms):
            colour = _COLOURS[1:][place % (len(_COLOURS) - 1)]
            for group, sampling in enumerate(results.samplings):
                values = results.values(sampling.name, arm, metric)
                found = estimate(values)
                x = group + (place - (len(arms) - 1) / 2) * 0.8 / len(arms)
                label = arm.title if group == 0 else None
                panel.bar(x, found.mean, 0.72 / len(arms), color=colour, alpha=0.75, label=label)
                ends = [[found.mean - found.low], [found.high - found.mean]]
                panel.errorbar(x, found.mean, ends, color="black", linewidth=1, capsize=2)
                panel.plot([x] * len(values), values, ".", color="black", markersize=2.5)
        for group, sampling in enumerate(results.samplings):
            label = "base" if group == 0 else None
            base = results.value(sampling.name, BASE, metric)
            panel.hlines(base, group - 0.45, group + 0.45, color=_COLOURS[0], label=label)
        names = [
            f"{s.name.replace('_', ' ')}\n{s.steps} steps, g {s.guidance:g}"
            for s in results.samplings
        ]
        panel.set_xticks(range(len(results.samplings)), names, fontsize=8)
        panel.set_title(
            title + (" (higher is better)" if "correct" in title else " (lower is better)")
        )
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=_DPI)


def plot_differences(results: Results, first: Arm, others: Sequence[Arm], path: Path) -> None:
    """``first`` minus each other arm by the score decided on, a dot a seed, with its interval."""
    figure, (panel,) = _panels(1, width=6.0, height=0.55 * len(others) + 1.3)
    sampling, metric = PRIMARY
    for row, other in enumerate(reversed(others)):
        found = results.difference(first, other)
        mine, theirs = (results.values(sampling, arm, metric) for arm in (first, other))
        panel.plot(
            [one - two for one, two in zip(mine, theirs, strict=True)],
            [row] * len(mine),
            ".",
            color=_COLOURS[0],
        )
        ends = [[found.mean - found.low], [found.high - found.mean]]
        panel.errorbar(found.mean, row, xerr=ends, fmt="o", color=_COLOURS[1], capsize=3)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(others)), [other.title for other in reversed(others)])
    panel.set_ylim(-0.5, len(others) - 0.5)
    panel.set_xlabel(f"{first.title} minus the other: share drawn right, {sampling}")
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI)


def _panels(count: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
