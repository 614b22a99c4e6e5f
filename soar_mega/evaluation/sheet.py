"""``report.png``: the first prompts, a row each, and each model's first picture of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from soar_mega.evaluation.interface import Prompt

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_INK, _GREY, _PAPER, _LINE = (32, 32, 36), (95, 99, 104), (250, 250, 250), (218, 220, 224)
_TILE, _GAP, _TEXT_WIDTH, _FONT = 256, 16, 260, 15
_MOST_LINES = 4  # of scores under a picture


def contact_sheet(
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    open_picture: Callable[[str, tuple[int, int]], Image.Image],
    scores_of: Callable[[str, tuple[int, int]], Mapping[str, float]],
) -> Image.Image:
    """The sheet.

    Args:
        prompts: Those to show, from the first.
        labels: Of the models, a column each.
        open_picture: Of a label and (prompt, repeat).
        scores_of: The same; the first few are shown.
    """
    font, small = ImageFont.load_default(_FONT), ImageFont.load_default(12)
    shown = [
        [_score_lines(scores_of(label, (number, 0))) for label in labels]
        for number in range(len(prompts))
    ]
    most = max((len(lines) for row in shown for lines in row), default=0)
    top, step = 2 * _GAP + _FONT, 15
    row_height = _TILE + most * step + _GAP
    size = (
        _GAP + _TEXT_WIDTH + len(labels) * (_TILE + _GAP),
        top + len(prompts) * row_height,
    )
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    lefts = [_GAP + _TEXT_WIDTH + column * (_TILE + _GAP) for column in range(len(labels))]
    for left, label in zip(lefts, labels, strict=True):
        pen.text((left, _GAP), _fitted(label, font, _TILE), _INK, font)
    for number, prompt in enumerate(prompts):
        y = top + number * row_height
        pen.line((_GAP, y - _GAP // 2, size[0] - _GAP, y - _GAP // 2), _LINE)
        room = (row_height - _GAP) // (_FONT + 4)
        lines = _wrapped(prompt.text, font, _TEXT_WIDTH - _GAP)
        category = [prompt.category] if prompt.category else []
        if len(lines) > room - len(category):
            lines = [*lines[: room - len(category) - 1], "..."]
        for place, line in enumerate([*lines, *category]):
            colour = _INK if place < len(lines) else _GREY
            pen.text((_GAP, y + place * (_FONT + 4)), line, colour, font)
        for left, label, scores in zip(lefts, labels, shown[number], strict=True):
            picture = open_picture(label, (number, 0))
            tile = _resized(picture)
            x_off, y_off = (_TILE - tile.width) // 2, (_TILE - tile.height) // 2
            sheet.paste(tile, (left + x_off, y + y_off))
            pen.rectangle((left, y, left + _TILE - 1, y + _TILE - 1), outline=_LINE)
            for place, line in enumerate(scores):
                at = (left, y + _TILE + 1 + place * step)
                pen.text(at, _fitted(line, small, _TILE), _GREY, small)
    return sheet


def _score_lines(scores: Mapping[str, float]) -> list[str]:
    lines = [f"{name} {value:.3g}" for name, value in scores.items()]
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "..."]


def _resized(picture: Image.Image) -> Image.Image:
    """To the tile's longer side; small pictures keep hard pixels."""
    factor = _TILE / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    way = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return picture.resize(size, way)


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    lines: list[str] = [""]
    for word in text.split():
        tried = f"{lines[-1]} {word}".strip()
        if font.getlength(tried) <= width or not lines[-1]:
            lines[-1] = _fitted(tried, font, width)
        else:
            lines.append(_fitted(word, font, width))
    return lines


def _fitted(text: str, font: _Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
