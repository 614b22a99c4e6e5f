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


def plot_differences(
    results: Results, pairs: Sequence[tuple[str, Sequence[tuple[Arm, Arm]]]], path: Path
) -> None:
    """Differences drawn as the comparison is decided: a dot a seed, the mean with its interval.

    Args:
        results: What was found.
        pairs: A row's label and its (first, second) arms: first minus second, one below the other.
        path: PNG to write.
    """
    metrics = list(METRICS.items())[:2]
    figure, panels = _panels(len(metrics), width=4.8, height=0.45 * len(pairs) + 1.4)
    labels = [label for label, _ in reversed(pairs)]
    for panel, (metric, title) in zip(panels, metrics, strict=True):
        for row, (_, two) in enumerate(reversed(pairs)):
            if row % 2 and len(two) > 1:
                panel.axhspan(row - 0.5, row + 0.5, color="#f1f3f6", zorder=0)
            for place, (first, second) in enumerate(two):
                y = row - (place - (len(two) - 1) / 2) * 0.24
                colour = _COLOURS[1:][place]
                found = results.difference(first, second, metric=metric)
                ones, others = (results.values(PRIMARY[0], arm, metric) for arm in (first, second))
                seeds = [one - other for one, other in zip(ones, others, strict=True)]
                panel.plot(seeds, [y] * len(seeds), ".", color=colour, alpha=0.4, markersize=4)
                ends = [[found.mean - found.low], [found.high - found.mean]]
                label = f"minus {second.title}" if len(two) > 1 and row == 0 else None
                style = {"fmt": "o", "color": colour, "capsize": 2, "markersize": 4}
                panel.errorbar(found.mean, y, xerr=ends, label=label, **style)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.locator_params(axis="x", nbins=6)
        panel.set_yticks(range(len(labels)), labels if panel is panels[0] else [""] * len(labels))
        panel.set_ylim(-0.6, len(labels) - 0.4)
        better = "higher" if metric == PRIMARY[1] else "lower"
        panel.set_title(f"difference in {title} ({better} is better)", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=_DPI)


def _panels(count: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
