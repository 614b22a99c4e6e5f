"""Draws a record: samples/s of every variant as bars, with the reference and what bounds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soar_mega.pipeline.timeline_canvas import LETTER, Canvas, Colour, make_canvas, mix
from soar_mega.training.benchmark_step.report import bounds, subtitle, title

INK, FAINT, GRID = (31, 41, 55), (107, 114, 128), (226, 230, 236)
OURS, EIGHT_BITS, REFERENCE = (37, 99, 176), (16, 145, 120), (150, 158, 171)
WHITE = (255, 255, 255)
BOUNDS = ((196, 56, 108), (226, 106, 72))

LEFT, PLOT, COLUMNS = 216.0, 560.0, (64.0, 138.0, 226.0, 326.0)
RIGHT = COLUMNS[-1] + 24
TOP, ROW, BAR, FOOT = 96.0, 26.0, 17.0, 80.0


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a record, its tables one below the other.

    Args:
        record: See ``record.record_of``.
        path: Ends in ``.png`` or ``.svg``.

    Raises:
        ValueError: Another ending.
    """
    tables = record["tables"]
    heights = [TOP + ROW * len(table["sides"]) + FOOT for table in tables]
    canvas = make_canvas(path, LEFT + PLOT + RIGHT, sum(heights))
    top = 0.0
    for table, height in zip(tables, heights, strict=True):
        _Table(canvas, record, table, top).draw()
        top += height
    canvas.save(path)


class _Table:
    def __init__(
        self, canvas: Canvas, record: Mapping[str, Any], table: Mapping[str, Any], top: float
    ) -> None:
        self.canvas, self.record, self.table, self.top = canvas, record, table, top
        self.bounds = bounds(record, table)
        rates = [s["median"]["samples_per_s"] for s in table["sides"] if "median" in s]
        self.full = 1.04 * max([*rates, *self.bounds.values()], default=1.0)
        self.first = top + TOP
        self.last = self.first + ROW * len(table["sides"])

    def x(self, samples_per_s: float) -> float:
        return LEFT + samples_per_s / self.full * PLOT

    def draw(self) -> None:
        text = self.canvas.text
        machine, versions = self.record["hardware"], self.record["versions"]
        text(24, self.top + 26, title(self.table), 16, INK)
        below = f"{machine.get('gpu', machine['cpu'])}; {subtitle(self.table)}; "
        text(24, self.top + 48, below + f"torch {versions['torch']}", 11, FAINT)
        self.axis()
        heads = (
            "MFU" if self.record["peak_tflops"] else "TFLOP/s",
            "+ peak GiB",
            "x reference",
            "x same recomp.",
        )
        for at, words in zip(COLUMNS, heads, strict=True):
            text(LEFT + PLOT + at, self.first - 12, words, 10, FAINT, "right")
        for index, side in enumerate(self.table["sides"]):
            self.row(side, self.first + ROW * index + ROW / 2)
        self.mark_bounds()

    def axis(self) -> None:
        step = next(
            step
            for power in range(-6, 7)
            for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
            if self.full / step <= 8
        )
        for at in range(int(self.full / step) + 1):
            x = self.x(at * step)
            self.canvas.line(x, self.first, x, self.last, GRID)
            self.canvas.text(x, self.last + 11, f"{at * step:g}", 10, FAINT, "middle")
        words = "samples/s" + (" per GPU" if self.record["device"] == "cuda" else "")
        self.canvas.text(LEFT + PLOT / 2, self.last + 28, words, 11, FAINT, "middle")

    def row(self, side: Mapping[str, Any], middle: float) -> None:
        text = self.canvas.text
        text(LEFT - 10, middle, side["label"], 11, INK, "right")
        if "median" not in side:
            words = f"failed: {side['failed']}" if "failed" in side else "not measured"
            end = min((self.x(samples) for samples in self.bounds.values()), default=LEFT + PLOT)
            room = int((end - LEFT - 12) / (LETTER * 10))
            words = words if len(words) <= room else words[: room - 3] + "..."
            text(LEFT + 6, middle, words, 10, FAINT)
            return
        median = side["median"]
        end = self.x(median["samples_per_s"])
        colour = colour_of(side["variant"])
        self.canvas.rect(LEFT, middle - BAR / 2, end - LEFT, BAR, colour)
        shown = _three_digits(median["samples_per_s"])
        if end - LEFT > 60:
            text(end - 6, middle, shown, 11, WHITE, "right")
        else:
            text(end + 6, middle, shown, 11, INK)
        rate = f"{median['model_tflops']:.3g}" if median["mfu"] is None else f"{median['mfu']:.1%}"
        ratios = [side["ratios"].get(name) for name in ("as published", "same recomputation")]
        cells = (
            rate,
            f"{median['peak_growth_bytes'] / 2**30:.2f}",
            *("" if ratio is None else f"{ratio['speed']:.2f}" for ratio in ratios),
        )
        for at, words in zip(COLUMNS, cells, strict=True):
            text(LEFT + PLOT + at, middle, words, 11, INK, "right")

    def mark_bounds(self) -> None:
        x = LEFT
        for (name, samples), colour in zip(self.bounds.items(), BOUNDS, strict=False):
            at = self.x(samples)
            for dash in range(int((self.last - self.first + 6) / 8)):
                y = self.first - 6 + 8 * dash
                self.canvas.rect(at - 0.75, y, 1.5, 5, colour)
            words = f"bound by the {name}: {_three_digits(samples)}"
            self.canvas.rect(x, self.last + 51, 12, 3, colour)
            self.canvas.text(x + 18, self.last + 52.5, words, 11, mix(colour, INK, 0.35))
            x += 18 + LETTER * 11 * len(words) + 24


def _three_digits(number: float) -> str:
    return f"{number:#.3g}".rstrip(".")


def colour_of(variant: Mapping[str, Any]) -> Colour:
    """The reference grey, FP8 green, the others blue; recomputation paler."""
    colour = EIGHT_BITS if variant["fp8_recipe"] != "none" else OURS
    if variant["side"] == "reference":
        colour = REFERENCE
    shade = {"none": 0.0, "selective": 0.2, "full": 0.35}[variant["activation_checkpointing"]]
    return mix(colour, WHITE, shade)
