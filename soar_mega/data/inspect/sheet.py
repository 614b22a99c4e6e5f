"""A contact sheet: pictures with their captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from soar_mega.data.decode.check import thumbnail
from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.index import ShardIndex

MAX_SAMPLES = 400  # a sheet of more is no longer looked at
_CELL, _GAP, _LINES = 256, 12, 4  # pixels, pixels, lines of caption
_TEXT_SIZE, _LINE_HEIGHT = 14, 18
_PAPER, _INK, _FAINT, _WRONG = "white", "black", "#707070", "#b00020"


def choose_samples(
    index: ShardIndex, count: int, *, seed: int = 0, keys: Sequence[str] = ()
) -> list[int]:
    """Samples for a sheet, in the order of the shards.

    Args:
        index: The samples.
        count: How many to draw at random; all if there are fewer.
        seed: Of the draw.
        keys: Take the samples of these keys instead.

    Raises:
        DataError: ``count`` is outside 1 to ``MAX_SAMPLES``, or no sample has one of the keys.
    """
    if keys:
        wanted = set(keys)
        found = [sample for sample in range(len(index)) if index.key(sample) in wanted]
        absent = wanted - {index.key(sample) for sample in found}
        if absent:
            raise DataError(f"--keys: no sample has the key {sorted(absent)[0]!r}. Correct it.")
        return found
    if not 1 <= count <= MAX_SAMPLES:
        raise DataError(f"--samples={count}: must be from 1 to {MAX_SAMPLES}. Choose fewer.")
    chosen = np.random.default_rng(seed).choice(len(index), min(count, len(index)), replace=False)
    return sorted(chosen.tolist())


def contact_sheet(index: ShardIndex, samples: Sequence[int], out: Path) -> None:
    """Write a picture of ``samples``, whole pictures upright, with caption and key below each.

    What cannot be shown has its reason in its place.

    Raises:
        DataError: The set is encoded.
        OSError: ``out`` cannot be written.
        ValueError: PIL knows no format of this ending.
    """
    if index.encoded:
        raise DataError("--sheet: these are encoded shards, which hold no pictures. Leave it out.")
    columns = min(len(samples), max(1, round(math.sqrt(len(samples) * 1.4))))
    rows = -(-len(samples) // columns)
    width, height = _CELL + _GAP, _CELL + (_LINES + 1) * _LINE_HEIGHT + 2 * _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), _PAPER)
    font = ImageFont.load_default(_TEXT_SIZE)
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        _draw_picture(sheet, draw, font, index, sample, left, top)
        _draw_text(draw, font, index, sample, left, top + _CELL + 4)
    sheet.save(out)


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _draw_picture(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: _Font,
    index: ShardIndex,
    sample: int,
    left: int,
    top: int,
) -> None:
    try:
        picture = thumbnail(index.read_image(sample), _CELL)
    except BadSampleError as error:
        draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=_WRONG)
        for n, line in enumerate(_wrapped(error.kind, draw, font, _CELL - 16, 8)):
            draw.text((left + 8, top + 8 + n * _LINE_HEIGHT), line, _WRONG, font)
        return
    sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))


def _draw_text(
    draw: ImageDraw.ImageDraw, font: _Font, index: ShardIndex, sample: int, left: int, top: int
) -> None:
    try:
        caption, ink = index.read_caption(sample) or "(empty)", _INK
    except BadSampleError as error:
        caption, ink = error.kind, _WRONG
    lines = _wrapped(caption, draw, font, _CELL, _LINES)
    key = _wrapped(index.key(sample), draw, font, _CELL, 1)
    for n, line in enumerate(lines + key):
        colour = _FAINT if n == len(lines) else ink
        draw.text((left, top + n * _LINE_HEIGHT), line, colour, font)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: _Font, width: int, most: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels; what does not fit ends in three dots."""
    words = " ".join(text[:2000].split())
    longest = width // 2  # no letter is narrower than 2 pixels

    def fitting(end: str) -> int:
        lengths = range(min(len(words), longest), 1, -1)
        return next((n for n in lengths if draw.textlength(words[:n] + end, font) <= width), 1)

    lines: list[str] = []
    while words and len(lines) < most:
        fits = fitting("")
        if fits < len(words) and len(lines) == most - 1:
            lines.append(words[: fitting("...")] + "...")
            break
        if fits < len(words):
            space = words.rfind(" ", 0, fits + 1)
            fits = space if space > 0 else fits
        lines.append(words[:fits].rstrip())
        words = words[fits:].lstrip()
    return lines
