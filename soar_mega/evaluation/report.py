"""Reports of what a reader found: ``report.json``, a table for the terminal, a grid of pictures.

Everything is keyed by label: what a column of the table and a row of the grid is called, for
example ``"pretrained"``, ``"after SOAR"``, ``"real pictures"``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from soar_mega.data.tiny import digits
from soar_mega.evaluation.digits import DigitReader, Picture, Reading, score_readings

Scores = Mapping[str, float | int]

_ROWS = {
    "per_digit_accuracy": "digits read right",
    "exact_number_accuracy": "whole numbers right",
    "count_accuracy": "digit count right",
    "ink_accuracy": "ink colour right",
    "paper_accuracy": "paper colour right",
    "position_accuracy": "position right",
}
_GREEN, _RED, _INK, _PAPER = (0, 112, 48), (192, 16, 32), (32, 32, 36), (250, 250, 250)
_SCALE, _GAP, _LINE = 2, 10, 15
_TILE = digits.PICTURE_SIZE * _SCALE


def table(scores: Mapping[str, Scores]) -> str:
    """Scores of each label as a table of per cents, one column a label."""
    labels = list(scores)
    width = max(len(text) for text in _ROWS.values())
    widths = [max(len(label), 7) for label in labels]
    lines = [
        " " * width + "".join(f"  {label:>{w}}" for label, w in zip(labels, widths, strict=True))
    ]
    for key, text in _ROWS.items():
        cells = (
            f"  {100.0 * scores[label][key]:>{w - 2}.1f} %"
            for label, w in zip(labels, widths, strict=True)
        )
        lines.append(f"{text:<{width}}" + "".join(cells))
    counts = (
        f"  {scores[label]['pictures']:>{w}}" for label, w in zip(labels, widths, strict=True)
    )
    lines.append(f"{'pictures':<{width}}" + "".join(counts))
    return "\n".join(lines)


def _verdict(reading: Reading, scene: digits.Scene) -> list[list[tuple[str, bool]]]:
    """Lines of words, each with whether it is right."""
    return [
        [(reading.number or "nothing", reading.number == scene.number)],
        [
            (reading.ink or "no ink", reading.ink == scene.ink),
            ("on", True),
            (reading.paper or "no paper", reading.paper == scene.paper),
        ],
        [(reading.position or "nowhere", reading.position == scene.position)],
    ]


def _caption_lines(scene: digits.Scene) -> list[str]:
    return [scene.number, f"{scene.ink} on {scene.paper}", scene.position]


def picture_grid(
    scenes: Sequence[digits.Scene],
    pictures: Mapping[str, Sequence[Picture]],
    readings: Mapping[str, Sequence[Reading]],
) -> Image.Image:
    """One column a scene: what was asked for, then each label's picture and what was read in it.

    A word that was read right is green, a wrong one red.

    Raises:
        ValueError: If a label has fewer pictures or readings than there are scenes.
    """
    for label in pictures:
        if min(len(pictures[label]), len(readings[label])) < len(scenes):
            raise ValueError(f"{label!r} has fewer pictures or readings than {len(scenes)} scenes.")
    font = ImageFont.load_default(12)
    left = 16 + int(max(font.getlength(label) for label in [*pictures, "asked for"]))
    row_height = _TILE + 3 * _LINE + _GAP
    top = 3 * _LINE + 2 * _GAP
    size = (left + len(scenes) * (_TILE + _GAP), top + len(pictures) * row_height)
    grid = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(grid)
    pen.text((8, _GAP), "asked for", _INK, font)
    for row, label in enumerate(pictures):
        pen.text((8, top + row * row_height + _TILE // 2), label, _INK, font)
    for column, scene in enumerate(scenes):
        x = left + column * (_TILE + _GAP)
        for line, text in enumerate(_caption_lines(scene)):
            pen.text((x, _GAP + line * _LINE), text, _INK, font)
        for row, label in enumerate(pictures):
            y = top + row * row_height
            picture = pictures[label][column]
            tile = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            resized = tile.convert("RGB").resize((_TILE, _TILE), Image.Resampling.NEAREST)
            grid.paste(resized, (x, y))
            pen.rectangle((x, y, x + _TILE - 1, y + _TILE - 1), outline=(200, 200, 200))
            for line, words in enumerate(_verdict(readings[label][column], scene)):
                at = float(x)
                for word, right in words:
                    colour = _GREEN if right else _RED
                    pen.text((at, y + _TILE + 1 + line * _LINE), word, colour, font)
                    at += font.getlength(word + " ")
    return grid


def write_report(
    folder: Path,
    scenes: Sequence[digits.Scene],
    pictures: Mapping[str, Sequence[Picture]],
    reader: DigitReader,
    *,
    notes: Mapping[str, Any] | None = None,
    grid_columns: int = 8,
) -> dict[str, Scores]:
    """Reads and scores every label's pictures; writes ``report.json`` and ``before_after.png``.

    Args:
        folder: Where the files go; made if missing.
        scenes: What was asked for.
        pictures: Of each label, one picture a scene.
        reader: What reads them.
        notes: Plain values to keep beside the scores, for example steps and guidance scale.
        grid_columns: How many of the scenes the grid shows, the first ones.

    Returns:
        The scores of each label.

    Raises:
        ValueError: If a label does not have as many pictures as there are scenes.
    """
    readings = {label: reader.read(list(pictures[label])) for label in pictures}
    scores: dict[str, Scores] = {
        label: score_readings(readings[label], scenes) for label in pictures
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "scores": scores,
        "chance": {"per_digit_accuracy": 0.1},
        "notes": dict(notes or {}),
        "pictures": [
            {"asked_for": scene.to_json()}
            | {label: vars(readings[label][number]) for label in readings}
            for number, scene in enumerate(scenes)
        ],
    }
    text = json.dumps(content, indent=1) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    shown = scenes[:grid_columns]
    picture_grid(shown, pictures, readings).save(folder / "before_after.png")
    return scores
