"""Pages of handwriting with harder captions than ``digits``': the benchmark ``handwriting``.

A page is the 4x4 grid of cells of ``digits`` with digits anywhere, each in an ink of its own. Four
kinds, each with a caption that says what must be right and leaves the rest to the model:

- ``number``   "red 40718 on white": three to six digits in reading order from the first cell;
- ``colour``   "red 3 blue 5 green 7 on white": which digit has which ink; cells are free;
- ``position`` "red 3 b2 5 d4 on white": which digit is in which cell, column a-d, row 1-4;
- ``count``    "five red 3 on white": how many; cells are free.

A fifth of all combinations is held out: of numbers, of (ink, digit) sets, of (digit, cell) sets, of
(count, digit, ink) triples. What decides is a hash of the combination, the same for every seed.

Two ways to draw. ``curated`` pages show what their captions say, in full ink, digits in the middle
of their cells. ``raw`` pages are what a crawl brings: a share of captions is wrong in one word, ink
is pale, digits sit a little off.

Legend: B pages, H/W picture height and width in px.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from soar_mega.data.tiny import digits

Kind = Literal["number", "colour", "position", "count"]
KINDS: tuple[Kind, ...] = ("number", "colour", "position", "count")
CELLS = digits.GRID * digits.GRID
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
_SQUARES = [f"{'abcd'[cell % digits.GRID]}{cell // digits.GRID + 1}" for cell in range(CELLS)]
_HELD_OUT_ONE_IN = 5
_WRONG_CAPTIONS = 0.2
_PALEST = 0.6  # share of the ink's strength
_FARTHEST = 1  # px off the middle of the cell


@dataclass(frozen=True)
class Mark:
    """A digit on a page; ``cell`` counts from 0 in reading order, None: the model may choose."""

    digit: int
    ink: str
    cell: int | None


@dataclass(frozen=True)
class Page:
    """What one caption asks for.

    Attributes:
        kind: Which of ``KINDS``.
        marks: The digits, in the caption's order.
        paper: A key of ``digits.PAPERS``.
    """

    kind: Kind
    marks: tuple[Mark, ...]
    paper: str

    @property
    def caption(self) -> str:
        """The sentence; ``parse_caption`` inverts it."""
        first = self.marks[0]
        if self.kind == "number":
            what = f"{first.ink} {''.join(str(mark.digit) for mark in self.marks)}"
        elif self.kind == "colour":
            what = " ".join(f"{mark.ink} {mark.digit}" for mark in self.marks)
        elif self.kind == "position":
            what = " ".join(f"{mark.digit} {_SQUARES[mark.cell or 0]}" for mark in self.marks)
            what = f"{first.ink} {what}"
        else:
            what = f"{COUNTS[len(self.marks) - 2]} {first.ink} {first.digit}"
        return f"{what} on {self.paper}"

    @property
    def held_out(self) -> bool:
        """Whether no training page shows this combination."""
        marks = self.marks
        if self.kind == "number":
            key = "".join(str(mark.digit) for mark in marks)
        elif self.kind == "count":
            key = f"{len(marks)} {marks[0].ink} {marks[0].digit}"
        else:
            pairs = [f"{m.digit} {m.ink if self.kind == 'colour' else m.cell}" for m in marks]
            key = " ".join(sorted(pairs))
        return zlib.crc32(f"{self.kind} {key}".encode()) % _HELD_OUT_ONE_IN == 0

    def to_json(self) -> dict[str, Any]:
        """Kind, paper and marks as plain values."""
        return {"kind": self.kind, "paper": self.paper, "marks": [vars(m) for m in self.marks]}


def parse_caption(caption: str) -> Page:
    """The page a caption of ours describes.

    Raises:
        ValueError: If it is none.
    """
    inks, papers = "|".join(digits.INKS), "|".join(digits.PAPERS)
    match = re.fullmatch(rf"(.+) on ({papers})", caption.strip())
    what, paper = match.groups() if match else ("", "")
    if found := re.fullmatch(rf"({inks}) (\d{{3,6}})", what):
        ink, number = found.groups()
        marks = [Mark(int(digit), ink, cell) for cell, digit in enumerate(number)]
        return Page("number", tuple(marks), paper)
    if found := re.fullmatch(rf"({'|'.join(COUNTS)}) ({inks}) (\d)", what):
        count, ink, digit = found.groups()
        return Page("count", (Mark(int(digit), ink, None),) * (COUNTS.index(count) + 2), paper)
    if found := re.fullmatch(rf"({inks})((?: \d [a-d][1-4]){{2,3}})", what):
        words = found[2].split()
        pairs = zip(words[::2], words[1::2], strict=True)
        marks = [Mark(int(digit), found[1], _SQUARES.index(square)) for digit, square in pairs]
        return Page("position", tuple(marks), paper)
    if re.fullmatch(rf"(?:{inks}) \d(?: (?:{inks}) \d){{1,2}}", what):
        words = what.split()
        pairs = zip(words[::2], words[1::2], strict=True)
        return Page("colour", tuple(Mark(int(d), ink, None) for ink, d in pairs), paper)
    raise ValueError(
        f'Not a caption of a page: {caption!r}. It must read like "red 40718 on white", "red 3 '
        'blue 5 on mint", "red 3 b2 5 d4 on white" or "five red 3 on pink".'
    )


def _page(kind: Kind, rng: np.random.Generator) -> Page:
    inks, papers = list(digits.INKS), list(digits.PAPERS)
    paper, ink = papers[rng.integers(len(papers))], inks[rng.integers(len(inks))]
    if kind == "number":
        numerals = rng.integers(10, size=rng.integers(3, 7))
        marks = [Mark(int(digit), ink, cell) for cell, digit in enumerate(numerals)]
    elif kind == "count":
        marks = [Mark(int(rng.integers(10)), ink, None)] * (2 + int(rng.integers(len(COUNTS))))
    else:
        size = int(rng.integers(2, 4))
        numerals = rng.permutation(10)[:size]
        if kind == "colour":
            some = rng.permutation(len(inks))[:size]
            marks = [Mark(int(d), inks[i], None) for d, i in zip(numerals, some, strict=True)]
        else:
            cells = rng.permutation(CELLS)[:size]
            marks = [Mark(int(d), ink, int(c)) for d, c in zip(numerals, cells, strict=True)]
    return Page(kind, tuple(marks), paper)


def make_pages(count: int, seed: int | Sequence[int], *, held_out: bool) -> list[Page]:
    """``count`` pages, kinds in turn, all or none of them of held-out combinations."""
    rng = np.random.default_rng([*np.atleast_1d(seed), int(held_out)])
    pages: list[Page] = []
    while len(pages) < count:
        page = _page(KINDS[len(pages) % len(KINDS)], rng)
        if page.held_out == held_out:
            pages.append(page)
    return pages


def _one_word_wrong(page: Page, rng: np.random.Generator) -> Page:
    """The page with one digit or all of one ink changed."""
    marks = list(page.marks)
    chosen = marks[rng.integers(len(marks))]
    if rng.random() < 0.5:
        others = [ink for ink in digits.INKS if ink not in {mark.ink for mark in marks}]
        ink = others[rng.integers(len(others))]
        marks = [replace(m, ink=ink) if m.ink == chosen.ink else m for m in marks]
    else:
        digit = int((chosen.digit + rng.integers(1, 10)) % 10)
        same = page.kind == "count"
        marks = [replace(m, digit=digit) if same or m is chosen else m for m in marks]
    return replace(page, marks=tuple(marks))


def draw_page(
    page: Page, scans: digits.Scans, rng: np.random.Generator, *, raw: bool = False
) -> np.ndarray:
    """One picture of a page, (H, W, 3) uint8; ``rng`` picks scans, free cells and flaws."""
    if raw and rng.random() < _WRONG_CAPTIONS:
        page = _one_word_wrong(page, rng)
    free = iter(rng.permutation(CELLS))
    size, glyph_size = digits.CELL_SIZE, (digits.GLYPH_HEIGHT, digits.GLYPH_WIDTH)
    top, left = ((size - extent) // 2 for extent in glyph_size)
    paper = np.array(digits.PAPERS[page.paper], np.float32)
    pad = _FARTHEST
    side = digits.PICTURE_SIZE + 2 * pad
    picture = np.tile(paper, (side, side, 1))
    for mark in page.marks:
        cell = int(next(free)) if mark.cell is None else mark.cell
        row, column = divmod(cell, digits.GRID)
        choices = scans.by_digit[mark.digit]
        coverage = scans.glyphs_NGQ[choices[rng.integers(len(choices))]][..., None]
        y, x = pad + row * size + top, pad + column * size + left
        if raw:
            coverage = coverage * rng.uniform(_PALEST, 1.0)
            y, x = (at + int(rng.integers(-_FARTHEST, _FARTHEST + 1)) for at in (y, x))
        window = picture[y : y + glyph_size[0], x : x + glyph_size[1]]
        window += coverage * (np.array(digits.INKS[mark.ink], np.float32) - window)
    inner = picture[pad:-pad, pad:-pad]
    return inner.round().clip(0, 255).astype(np.uint8)


def draw_pages(
    pages: Sequence[Page], scans: digits.Scans, seed: int, *, raw: bool = False
) -> np.ndarray:
    """Pictures of pages, (B, H, W, 3) uint8, each a function of (seed, its place)."""
    return np.stack(
        [
            draw_page(page, scans, np.random.default_rng([seed, place]), raw=raw)
            for place, page in enumerate(pages)
        ]
    )
