"""A summary of shards as a short table and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from soar_mega.data.inspect.run import Summary

PLACES = 5  # of each kind of fault, in the table; JSON has all
PERCENTILES = (0, 5, 50, 95, 100)
_PERCENTILE_NAMES = ("min", "5 %", "50 %", "95 %", "max")
# Upper ends of width / height; the names say what lies below each and above the one before.
_RATIOS = (0.5, 2 / 3, 0.9, 1.1, 1.5, 2.0, np.inf)
_RATIO_NAMES = (
    "under 1:2",
    "1:2 to 2:3",
    "2:3 to 0.9",
    "about square",
    "1.1 to 3:2",
    "3:2 to 2:1",
    "over 2:1",
)


def table(summary: Summary) -> str:
    """For people."""
    kind = "encoded samples" if summary.encoded else "samples"
    lines = [
        f"shards    {summary.shards:,} ({summary.indexed:,} with an index)",
        f"{kind}   {summary.samples:,}",
        f"bytes     {summary.bytes:,}",
        f"ignored   {_counts(summary.ignored) or 'no member'}",
    ]
    if summary.written:
        lines.append(f"written   {len(summary.written):,} index files")
    lines += [
        "",
        " " * 24 + "".join(f"{name:>9}" for name in ("min", "5 %", "50 %", "95 %", "max")),
    ]
    for name, values in _columns(summary).items():
        if len(values):
            shown = "".join(f"{value:>9,}" for value in _percentiles(values))
            lines.append(f"{name:<24}{shown}")
    lengths = summary.caption_lengths_N
    lines.append(
        f"captions missing {int((lengths < 0).sum()):,}, empty {int((lengths == 0).sum()):,}"
    )
    lines += _ratio_lines(summary)
    lines += _bad_lines(summary)
    return "\n".join(lines)


def as_json(summary: Summary) -> dict[str, Any]:
    """For programs: the table's numbers, and every fault."""
    lengths = summary.caption_lengths_N
    return {
        "shards": summary.shards,
        "indexed": summary.indexed,
        "written": summary.written,
        "samples": summary.samples,
        "encoded": summary.encoded,
        "bytes": summary.bytes,
        "ignored": dict(summary.ignored),
        "percentiles": list(PERCENTILES),
        **{
            name.split(" (")[0].replace(" ", "_"): _percentiles(values)
            for name, values in _columns(summary).items()
        },
        "sizes_unknown": int((_known(summary) == 0).sum()),
        "aspect_ratios": _ratios(summary),
        "captions_missing": int((lengths < 0).sum()),
        "captions_empty": int((lengths == 0).sum()),
        "verified": summary.verified,
        "bad": [dataclasses.asdict(bad) for bad in summary.bad],
    }


def _known(summary: Summary) -> np.ndarray:
    """bool (N,): the size is known."""
    return (summary.sizes_N2[:, 0] > 0) & (summary.sizes_N2[:, 1] > 0)


def _columns(summary: Summary) -> dict[str, np.ndarray]:
    sizes_N2 = summary.sizes_N2[_known(summary)]
    return {
        "width (pixels)": sizes_N2[:, 0],
        "height (pixels)": sizes_N2[:, 1],
        "short side (pixels)": sizes_N2.min(axis=1) if len(sizes_N2) else sizes_N2[:, 0],
        "caption (characters)": summary.caption_lengths_N[summary.caption_lengths_N >= 0],
    }


def _percentiles(values_N: np.ndarray) -> list[int]:
    """Values that occur, not ones in between."""
    if not len(values_N):
        return []
    found = np.percentile(values_N, PERCENTILES, method="inverted_cdf")
    return [int(value) for value in found]


def _ratios(summary: Summary) -> dict[str, int]:
    sizes_N2 = summary.sizes_N2[_known(summary)]
    ratio_N = sizes_N2[:, 0] / sizes_N2[:, 1]
    counts = np.bincount(np.searchsorted(_RATIOS, ratio_N, side="left"), minlength=len(_RATIOS))
    return dict(zip(_RATIO_NAMES, counts.tolist(), strict=True))


def _ratio_lines(summary: Summary) -> list[str]:
    ratios, unknown = _ratios(summary), int((~_known(summary)).sum())
    total = sum(ratios.values())
    lines = ["", "width : height"]
    for name, number in ratios.items():
        if number:
            bar = "#" * max(1, round(40 * number / total))
            lines.append(f"  {name:<14}{number:>12,} {100 * number / total:5.1f} %  {bar}")
    if unknown:
        lines.append(f"  {'unknown':<14}{unknown:>12,}")
    return lines if len(lines) > 2 else []


def _bad_lines(summary: Summary) -> list[str]:
    by_kind = Counter(bad.kind for bad in summary.bad)
    if not by_kind:
        return ["", "verified: everything can be used"] if summary.verified else []
    lines = ["", "bad"]
    for kind, number in by_kind.most_common():
        lines.append(f"  {number:,} {kind}")
        places = [bad for bad in summary.bad if bad.kind == kind]
        for bad in places[:PLACES]:
            detail = bad.detail if bad.where in bad.detail else f"{bad.where}: {bad.detail}"
            lines.append(f"    {detail}")
        if number > PLACES:
            lines.append(f"    and {number - PLACES:,} more (--json lists all)")
    return lines


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.items()))
