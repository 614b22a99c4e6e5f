"""The table of an evaluation for a terminal: a column a model, a row a metric and category."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def rows(results: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Name and one cell a model, in the models' order; categories are indented.

    Args:
        results: Content of ``results.json``.
    """
    labels = list(results["models"])
    for scorer, found in results["scorers"].items():
        by_label = found["models"]
        for metric in dict.fromkeys(m for label in labels for m in by_label[label]):
            metrics = [by_label[label].get(metric) for label in labels]
            overall = [None if one is None else one["overall"] for one in metrics]
            yield f"{scorer}/{metric}", [cell(estimate) for estimate in overall]
            for category in dict.fromkeys(c for one in metrics if one for c in one["categories"]):
                own = [one["categories"].get(category) if one else None for one in metrics]
                yield f"  {category}", [cell(estimate) for estimate in own]


def cell(estimate: Mapping[str, Any] | None) -> str:
    """``0.812 [0.790, 0.833]``; ``-`` where there is nothing."""
    if estimate is None or estimate["value"] is None:
        return "-"
    shown = _number(estimate["value"])
    if estimate["low"] is None:
        return shown
    return f"{shown} [{_number(estimate['low'])}, {_number(estimate['high'])}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def table(results: Mapping[str, Any]) -> str:
    """All rows, aligned."""
    lines = [("", list(results["models"])), *rows(results)]
    first = max(len(name) for name, _ in lines)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines), strict=True)]
    return "\n".join(
        f"{name:<{first}}"
        + "".join(f"  {text:>{width}}" for text, width in zip(cells, widths, strict=True))
        for name, cells in lines
    )
