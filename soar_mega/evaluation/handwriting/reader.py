"""What a page shows, read from its pixels: every digit with its cell and its ink.

Paper is the picture's median colour. Every cell with enough ink holds a digit; its ink is the
palette colour whose blends with the paper explain that cell best; the numeral is read by the
classifier of ``evaluation.digits``, which was trained on scans that no training page shows.

Legend: B pictures, N digits found, H/W picture height and width, R/L grid rows and columns, Y/X the
place in a cell in px, K inks, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from soar_mega.data.tiny import digits
from soar_mega.data.tiny.pages import Mark
from soar_mega.evaluation.digits import (
    MAX_SHIFT,
    MIN_CELL_INK,
    MIN_CONTRAST,
    crop_features,
    load_reader,
    nearest_paper,
    recentre,
)

_STRONG = 0.5  # of the largest change in a cell: pixels that tell the ink's colour


@dataclass(frozen=True)
class Reading:
    """One page as read.

    Attributes:
        marks: Its digits in reading order, each with ink and cell.
        paper: A key of ``digits.PAPERS``, or empty.
        features_NF: Ink coverage of each digit on the scans' 8x8 points.
    """

    marks: tuple[Mark, ...]
    paper: str
    features_NF: np.ndarray


def read_pages(pictures: Sequence[Image.Image]) -> list[Reading]:
    """Read 64x64 RGB pictures, each by itself.

    Raises:
        ValueError: A picture has another size.
    """
    found = [_take_apart(picture) for picture in pictures]
    features_NF = [crop_features(crops_NYX) for _, _, crops_NYX in found]
    every_NF = np.concatenate(features_NF) if found else np.zeros((0, 64))
    numerals = iter(load_reader().classifier.predict(every_NF) if len(every_NF) else [])
    return [
        Reading(tuple(Mark(int(next(numerals)), ink, cell) for ink, cell in places), paper, some_NF)
        for (paper, places, _), some_NF in zip(found, features_NF, strict=True)
    ]


def _take_apart(picture: Image.Image) -> tuple[str, list[tuple[str, int]], np.ndarray]:
    """Paper, (ink, cell) of each digit, and their crops (N, Y, X)."""
    side, size = digits.PICTURE_SIZE, digits.CELL_SIZE
    pixels_HWC = np.asarray(picture.convert("RGB"), np.float32)
    if pixels_HWC.shape != (side, side, 3):
        raise ValueError(f"a page has {side}x{side} pixels, this picture {picture.size}")
    paper = np.median(pixels_HWC.reshape(-1, 3), axis=0)
    change_HWC = pixels_HWC - paper
    names = list(digits.INKS)
    inks_KC = np.array(list(digits.INKS.values()), np.float32) - paper
    lengths_K = np.maximum((inks_KC**2).sum(-1), 1.0)
    places, crops = [], []
    for cell in range(digits.GRID**2):
        row, column = (at * size for at in divmod(cell, digits.GRID))
        inner_YXC = change_HWC[row : row + size, column : column + size]
        strength_YX = np.linalg.norm(inner_YXC, axis=-1)
        if strength_YX.max() < MIN_CONTRAST:
            continue
        telling_PC = inner_YXC[strength_YX >= _STRONG * strength_YX.max()]
        blend_PK = np.clip(telling_PC @ inks_KC.T / lengths_K, 0.0, 1.0)
        residual_PKC = telling_PC[:, None] - blend_PK[..., None] * inks_KC
        best = int((residual_PKC**2).sum((0, 2)).argmin())
        coverage_HW = np.clip(change_HWC @ inks_KC[best] / lengths_K[best], 0.0, 1.0)
        if coverage_HW[row : row + size, column : column + size].sum() < MIN_CELL_INK:
            continue
        padded = np.pad(coverage_HW, MAX_SHIFT)
        reach = size + 2 * MAX_SHIFT
        places.append((names[best], cell))
        crops.append(recentre(padded[row : row + reach, column : column + reach]))
    shape = (0, size, size)
    return nearest_paper(paper), places, np.stack(crops) if crops else np.zeros(shape, np.float32)
