"""Captioned pictures of handwritten numbers, composed of real scans.

scikit-learn ships 1,797 handwritten digits, scanned to 8x8 points of 17 grey levels. A ``Scene``
says what a picture shows (a number of one to three digits, ink, paper, position), ``draw`` composes
it from scans, and everything the scene says can be read back from the pixels, so that what a model
drew can be checked against its caption without downloading anything.

The picture is a grid of 4x4 cells of 16 px, the area of one image token of a model whose VAE
downsamples by 8 and that patchifies by 2. Every digit fills one cell, so a number is a horizontal
run of cells in the top or the bottom row, flush with the left or the right edge.

Two splits, the same for every seed:

- by scan, within each digit class: 50 % ``generator`` (training pictures), 40 % ``reader``
  (training of the classifier that reads generated pictures), 10 % ``held_out`` (seen by neither);
- by number: a fifth of the two-digit and a fifth of the three-digit numbers appear in held-out
  scenes only. One-digit numbers appear in training scenes only.

Legend: N scans, G/Q glyph height and width, H/W picture height and width in px.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

PICTURE_SIZE = 64
CELL_SIZE = 16
GLYPH_HEIGHT = 14
GLYPH_WIDTH = 16
GRID = PICTURE_SIZE // CELL_SIZE
MAX_DIGITS = 3

INKS: dict[str, tuple[int, int, int]] = {
    "black": (24, 24, 28),
    "red": (208, 20, 36),
    "green": (8, 120, 48),
    "blue": (24, 56, 208),
    "purple": (136, 24, 152),
}
PAPERS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 248),
    "yellow": (255, 232, 112),
    "pink": (255, 204, 216),
    "mint": (184, 240, 208),
}
# Name -> (row of cells, whether the number ends at the right edge instead of starting at the left).
POSITIONS: dict[str, tuple[int, bool]] = {
    "top left": (0, False),
    "top right": (0, True),
    "bottom left": (GRID - 1, False),
    "bottom right": (GRID - 1, True),
}

ScanRole = Literal["generator", "reader", "held_out"]
_SCAN_SHARES: dict[ScanRole, tuple[float, float]] = {
    "generator": (0.0, 0.5),
    "reader": (0.5, 0.9),
    "held_out": (0.9, 1.0),
}
_SPLIT_SEED = 20240  # Not the user's seed: a reader must stay disjoint from every generated set.
_HELD_OUT_SHARE = 0.2
_TRAINING_LENGTHS = (0.2, 0.4, 0.4)  # Shares of one-, two- and three-digit numbers.

_CAPTION = re.compile(
    rf"the number (?P<number>\d{{1,{MAX_DIGITS}}}) in (?P<ink>{'|'.join(INKS)}) ink "
    rf"on (?P<paper>{'|'.join(PAPERS)}) paper, (?P<position>{'|'.join(POSITIONS)})"
)


@dataclass(frozen=True)
class Scene:
    """What one picture shows: the truth behind a caption.

    Attributes:
        number: One to three decimal digits.
        ink: A key of ``INKS``.
        paper: A key of ``PAPERS``.
        position: A key of ``POSITIONS``.

    Raises:
        ValueError: If an attribute is none of these.
    """

    number: str
    ink: str
    paper: str
    position: str

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[0-9]{{1,{MAX_DIGITS}}}", self.number):
            raise ValueError(f"Scene.number={self.number!r}: must be 1 to {MAX_DIGITS} digits.")
        for name, value, known in (
            ("ink", self.ink, INKS),
            ("paper", self.paper, PAPERS),
            ("position", self.position, POSITIONS),
        ):
            if value not in known:
                raise ValueError(f"Scene.{name}={value!r}: must be one of {', '.join(known)}.")

    @property
    def caption(self) -> str:
        """The sentence that describes the picture; ``parse_caption`` inverts it."""
        return f"the number {self.number} in {self.ink} ink on {self.paper} paper, {self.position}"

    def cells(self) -> list[tuple[int, int]]:
        """(row, column) of the cell of each digit, first digit first."""
        row, at_right = POSITIONS[self.position]
        first = GRID - len(self.number) if at_right else 0
        return [(row, first + index) for index in range(len(self.number))]

    def to_json(self) -> dict[str, str]:
        """Caption and truth as plain values, for the JSON beside a picture."""
        return {
            "caption": self.caption,
            "number": self.number,
            "ink": self.ink,
            "paper": self.paper,
            "position": self.position,
        }


def parse_caption(caption: str) -> Scene:
    """The scene a caption of ours describes.

    Raises:
        ValueError: If the text is not a caption as ``Scene.caption`` writes it.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(
            f"Not a caption of a digit picture: {caption!r}. "
            'It must read like "the number 374 in red ink on yellow paper, top left".'
        )
    return Scene(**match.groupdict())


@dataclass(frozen=True)
class Scans:
    """Scans of one role and the glyphs drawn from them.

    Attributes:
        indices_N: Rows of scikit-learn's data set.
        labels_N: The digit, 0 to 9.
        glyphs_NGQ: fp32 ink coverage in [0, 1] at the size drawn.
        by_digit: For each digit, the positions in these arrays that show it.
    """

    indices_N: np.ndarray
    labels_N: np.ndarray
    glyphs_NGQ: np.ndarray
    by_digit: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, indices_N: np.ndarray, labels_N: np.ndarray, glyphs_NGQ: np.ndarray) -> Scans:
        """Scans from their arrays, sorted into digits."""
        by_digit = tuple(np.flatnonzero(labels_N == digit) for digit in range(10))
        return cls(indices_N, labels_N, glyphs_NGQ, by_digit)

    def subset(self, chosen: np.ndarray) -> Scans:
        """The scans at some positions of these arrays."""
        return Scans.of(self.indices_N[chosen], self.labels_N[chosen], self.glyphs_NGQ[chosen])


def _glyph(scan: np.ndarray) -> np.ndarray:
    """An 8x8 scan (0 to 16) as smooth anti-aliased ink coverage, (G, Q) fp32 in [0, 1]."""
    grey = Image.fromarray((scan * (255.0 / 16.0)).round().astype(np.uint8))
    # Half a column each side is cut: scans are narrow, and a digit shall be as wide as it can be.
    size = (8 * GLYPH_WIDTH, 8 * GLYPH_HEIGHT)
    fine = grey.resize(size, Image.Resampling.BICUBIC, box=(0.5, 0.0, 7.5, 8.0))
    # Steepen the blurred edge of the magnified stroke: ink, not fog. The box filter below then
    # leaves about one pixel of anti-aliasing. Much steeper would close the loops of 8 and 9.
    level = np.clip((np.asarray(fine, np.float32) / 255.0 - 0.15) / 0.7, 0.0, 1.0)
    return level.reshape(GLYPH_HEIGHT, 8, GLYPH_WIDTH, 8).mean(axis=(1, 3))


@cache
def load_scans(role: ScanRole) -> Scans:
    """The scans of one role; roles are disjoint and the same for every seed.

    Raises:
        ValueError: If ``role`` is not one of the roles.
    """
    from sklearn.datasets import load_digits

    if role not in _SCAN_SHARES:
        raise ValueError(f"role={role!r}: must be one of {', '.join(_SCAN_SHARES)}.")
    data = load_digits()
    low, high = _SCAN_SHARES[role]
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for digit in range(10):
        of_digit = rng.permutation(np.flatnonzero(data.target == digit))
        chosen.append(of_digit[round(low * len(of_digit)) : round(high * len(of_digit))])
    indices_N = np.sort(np.concatenate(chosen))
    glyphs_NGQ = np.stack([_glyph(data.images[index]) for index in indices_N])
    return Scans.of(indices_N, data.target[indices_N], glyphs_NGQ)


@cache
def held_out_numbers() -> frozenset[str]:
    """Two- and three-digit numbers that no training scene shows."""
    rng = np.random.default_rng(_SPLIT_SEED + 1)
    chosen: list[str] = []
    for low, high in ((10, 100), (100, 1000)):
        numbers = rng.permutation(np.arange(low, high))
        chosen += [str(number) for number in numbers[: round(_HELD_OUT_SHARE * len(numbers))]]
    return frozenset(chosen)


def _numbers(length: int, *, held_out: bool) -> list[str]:
    low = 0 if length == 1 else 10 ** (length - 1)
    every = (str(number) for number in range(low, 10**length))
    return [number for number in every if (number in held_out_numbers()) == held_out]


def _scenes(
    count: int, rng: np.random.Generator, lengths: tuple[float, ...], *, held_out: bool
) -> Iterator[Scene]:
    pools = [_numbers(length, held_out=held_out) for length in range(1, MAX_DIGITS + 1)]
    names = [list(INKS), list(PAPERS), list(POSITIONS)]
    for length in rng.choice(len(pools), size=count, p=lengths):
        pool = pools[length]
        ink, paper, position = (group[rng.integers(len(group))] for group in names)
        yield Scene(pool[rng.integers(len(pool))], ink, paper, position)


def training_scenes(count: int, seed: int | Sequence[int]) -> list[Scene]:
    """``count`` scenes with one to three digits, none showing a held-out number."""
    rng = np.random.default_rng([*np.atleast_1d(seed), 0])
    return list(_scenes(count, rng, _TRAINING_LENGTHS, held_out=False))


def held_out_scenes(count: int, seed: int | Sequence[int]) -> list[Scene]:
    """``count`` scenes with two or three digits, all showing held-out numbers."""
    rng = np.random.default_rng([*np.atleast_1d(seed), 1])
    return list(_scenes(count, rng, (0.0, 0.5, 0.5), held_out=True))


def draw_array(scene: Scene, scans: Scans, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene, (H, W, 3) uint8; ``rng`` picks a scan of each digit."""
    paper = np.array(PAPERS[scene.paper], np.float32)
    ink = np.array(INKS[scene.ink], np.float32)
    coverage_HW = np.zeros((PICTURE_SIZE, PICTURE_SIZE), np.float32)
    top, left = (CELL_SIZE - GLYPH_HEIGHT) // 2, (CELL_SIZE - GLYPH_WIDTH) // 2
    for digit, (row, column) in zip(scene.number, scene.cells(), strict=True):
        choices = scans.by_digit[int(digit)]
        y, x = row * CELL_SIZE + top, column * CELL_SIZE + left
        glyph = scans.glyphs_NGQ[choices[rng.integers(len(choices))]]
        coverage_HW[y : y + GLYPH_HEIGHT, x : x + GLYPH_WIDTH] = glyph
    picture_HWC = paper + coverage_HW[..., None] * (ink - paper)
    return picture_HWC.round().astype(np.uint8)


def draw(scene: Scene, scans: Scans, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene as an RGB image of 64x64 px; ``rng`` picks a scan of each digit."""
    return Image.fromarray(draw_array(scene, scans, rng))


def draw_many(scenes: Sequence[Scene], scans: Scans, seed: int) -> np.ndarray:
    """Pictures of scenes, (B, H, W, 3) uint8, each with scans chosen by (seed, its place)."""
    return np.stack(
        [
            draw_array(scene, scans, np.random.default_rng([seed, place]))
            for place, scene in enumerate(scenes)
        ]
    )
