"""Reads digit pictures from their pixels alone and scores them against their captions.

Paper is the picture's median colour; ink is the palette colour that best explains the rest as a
blend of the two; every cell of the grid with enough ink holds a digit. Digits are read by a support
vector machine trained on scans that no generated picture was trained on, drawn and sliced as the
pictures to be read are.

Legend: B pictures, H/W picture height and width in px, R/L grid rows and columns, Y/X the place in
a cell in px, K inks, P pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from soar_mega.data.tiny import digits

Picture = Image.Image | np.ndarray

_MAX_PAPER_DISTANCE = 60.0  # RGB distance from a palette paper beyond which it is none of them.
MIN_CONTRAST = 60.0  # RGB distance from the paper below which nothing is ink.
MIN_CELL_INK = 20.0  # Pixels of ink that make a digit; the thinnest scan has 49.
MAX_SHIFT = 2  # How far a digit may sit off its cell, in px.
_DRAWINGS = 5  # Drawings of each reader scan that the classifier is trained on.
_TELLING_PIXELS = 512  # The most inked pixels, by which the ink's colour is judged.
_SEED = 0


@dataclass(frozen=True)
class Reading:
    """What a picture shows, in the words of ``digits.Scene``; an empty string where unreadable.

    Attributes:
        number: The digits in reading order, of any length.
        ink: A key of ``digits.INKS`` or empty.
        paper: A key of ``digits.PAPERS`` or empty.
        position: A key of ``digits.POSITIONS`` or empty.
    """

    number: str
    ink: str
    paper: str
    position: str


@dataclass(frozen=True)
class _Page:
    """A picture taken apart, its digits not yet read."""

    ink: str
    paper: str
    position: str
    crops_NYX: np.ndarray


def _pixels(picture: Picture) -> np.ndarray:
    """(H, W, 3) fp32 pixels 0 to 255.

    Raises:
        ValueError: If the picture is not 64x64 RGB.
    """
    rgb = picture.convert("RGB") if isinstance(picture, Image.Image) else picture
    array = np.asarray(rgb, np.float32)
    expected = (digits.PICTURE_SIZE, digits.PICTURE_SIZE, 3)
    if array.shape != expected:
        raise ValueError(f"A digit picture must have the shape {expected}, this has {array.shape}.")
    return array


def nearest_paper(colour: np.ndarray) -> str:
    """The key of ``digits.PAPERS`` whose colour is nearest, or empty where none is near."""
    distances = {
        name: float(np.linalg.norm(colour - np.array(paper, np.float32)))
        for name, paper in digits.PAPERS.items()
    }
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= _MAX_PAPER_DISTANCE else ""


def _explain_ink(pixels_HWC: np.ndarray, paper: np.ndarray) -> tuple[str, np.ndarray]:
    """The ink whose blends with the paper come closest, and its coverage (H, W) in [0, 1]."""
    change_HWC = pixels_HWC - paper
    if float(np.linalg.norm(change_HWC, axis=-1).max()) < MIN_CONTRAST:
        return "", np.zeros(pixels_HWC.shape[:2], np.float32)
    inks_KC = np.array(list(digits.INKS.values()), np.float32) - paper
    lengths_K = np.maximum((inks_KC**2).sum(-1), 1.0)
    strength = (change_HWC**2).sum(-1).ravel()
    telling = strength.argpartition(-_TELLING_PIXELS)[-_TELLING_PIXELS:]
    telling_PC = change_HWC.reshape(-1, 3)[telling]
    blend_PK = np.clip(telling_PC @ inks_KC.T / lengths_K, 0.0, 1.0)
    residual_PKC = telling_PC[:, None] - blend_PK[..., None] * inks_KC
    best = int((residual_PKC**2).sum((0, 2)).argmin())
    coverage_HW = np.clip(change_HWC @ inks_KC[best] / lengths_K[best], 0.0, 1.0)
    return list(digits.INKS)[best], coverage_HW


def _nearest_position(coverage_HW: np.ndarray, count: int) -> str:
    """The position whose number of ``count`` digits would have its centre nearest to the ink's."""
    if not 1 <= count <= digits.MAX_DIGITS:
        return ""
    y, x = np.indices(coverage_HW.shape)
    centre = np.array([(coverage_HW * y).sum(), (coverage_HW * x).sum()]) / coverage_HW.sum()
    distances = {}
    for name in digits.POSITIONS:
        cells = digits.Scene("0" * count, "black", "white", name).cells()
        expected = (np.array(cells).mean(0) + 0.5) * digits.CELL_SIZE - 0.5
        distances[name] = float(np.linalg.norm(centre - expected))
    return min(distances, key=lambda name: distances[name])


def recentre(padded_YX: np.ndarray) -> np.ndarray:
    """The cell-sized window, at most ``MAX_SHIFT`` off the middle, with its ink centred best."""
    size = digits.CELL_SIZE
    inner = padded_YX[MAX_SHIFT : MAX_SHIFT + size, MAX_SHIFT : MAX_SHIFT + size]
    y, x = np.indices(inner.shape)
    total = max(float(inner.sum()), 1e-6)
    shifts = [float((inner * axis).sum()) / total - (size - 1) / 2 for axis in (y, x)]
    top, left = (MAX_SHIFT + int(np.clip(round(s), -MAX_SHIFT, MAX_SHIFT)) for s in shifts)
    return padded_YX[top : top + size, left : left + size]


def _take_apart(picture: Picture) -> _Page:
    pixels_HWC = _pixels(picture)
    paper = np.median(pixels_HWC.reshape(-1, 3), axis=0)
    ink, coverage_HW = _explain_ink(pixels_HWC, paper)
    grid, size = digits.GRID, digits.CELL_SIZE
    ink_RL = coverage_HW.reshape(grid, size, grid, size).sum((1, 3))
    cells = np.argwhere(ink_RL >= MIN_CELL_INK)
    padded = np.pad(coverage_HW, MAX_SHIFT)
    reach = size + 2 * MAX_SHIFT
    crops = [
        recentre(padded[row * size : row * size + reach, column * size : column * size + reach])
        for row, column in cells
    ]
    return _Page(
        ink=ink if crops else "",
        paper=nearest_paper(paper),
        position=_nearest_position(coverage_HW, len(crops)),
        crops_NYX=np.stack(crops) if crops else np.zeros((0, size, size), np.float32),
    )


def crop_features(crops_NYX: np.ndarray) -> np.ndarray:
    """(N, 64): crops reduced to the scans' own 8x8 points, flat; brightness-normalised per crop."""
    half = digits.CELL_SIZE // 8
    points = crops_NYX.reshape(-1, 8, half, 8, half).mean((2, 4)).reshape(-1, 64)
    return points / np.maximum(points.max(1, keepdims=True), 0.1)


class DigitReader:
    """Reads pictures; made by ``load_reader``, which trains the classifier.

    Attributes:
        classifier: scikit-learn's; reads rows of ``crop_features``.
    """

    def __init__(self, classifier: Any) -> None:
        self.classifier = classifier

    def read(self, pictures: Sequence[Picture]) -> list[Reading]:
        """What each picture shows.

        Args:
            pictures: 64x64 RGB images, or uint8 arrays (H, W, 3).

        Raises:
            ValueError: If a picture has another size.
        """
        pages = [_take_apart(picture) for picture in pictures]
        crops = np.concatenate([page.crops_NYX for page in pages]) if pages else np.zeros(0)
        numerals = self.classifier.predict(crop_features(crops)) if len(crops) else []
        remaining = iter(numerals)
        readings = []
        for page in pages:
            number = "".join(str(next(remaining)) for _ in page.crops_NYX)
            readings.append(Reading(number, page.ink, page.paper, page.position))
        return readings

    def score(
        self, pictures: Sequence[Picture], scenes: Sequence[digits.Scene]
    ) -> dict[str, float | int]:
        """Shares of pictures (or digits) that are what their scenes say.

        ``per_digit_accuracy`` compares the k-th digit read with the k-th of the scene; a digit that
        is missing is wrong. ``exact_number_accuracy`` asks for all of them and no more. ``ink``,
        ``paper``, ``position`` and ``count`` are shares of pictures; ``pictures`` and ``digits``
        say of how many.

        Raises:
            ValueError: If there are not as many pictures as scenes, or none.
        """
        return score_readings(self.read(pictures), scenes)


def score_readings(
    readings: Sequence[Reading], scenes: Sequence[digits.Scene]
) -> dict[str, float | int]:
    """``DigitReader.score`` of pictures that were read before."""
    if len(readings) != len(scenes) or not scenes:
        raise ValueError(
            f"{len(readings)} pictures for {len(scenes)} scenes: must be as many, at least one."
        )
    pairs = list(zip(readings, scenes, strict=True))
    right = sum(
        read == true
        for reading, scene in pairs
        for read, true in zip(reading.number, scene.number, strict=False)
    )
    total = sum(len(scene.number) for scene in scenes)

    def share(holds: Sequence[bool]) -> float:
        return sum(holds) / len(holds)

    return {
        "per_digit_accuracy": right / total,
        "exact_number_accuracy": share([r.number == s.number for r, s in pairs]),
        "count_accuracy": share([len(r.number) == len(s.number) for r, s in pairs]),
        "ink_accuracy": share([r.ink == s.ink for r, s in pairs]),
        "paper_accuracy": share([r.paper == s.paper for r, s in pairs]),
        "position_accuracy": share([r.position == s.position for r, s in pairs]),
        "pictures": len(scenes),
        "digits": total,
    }


def _worn(picture_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture a little noisy and a little shifted, as a generated one may be."""
    shift = tuple(int(step) for step in rng.integers(-1, 2, size=2))
    noisy = np.roll(picture_HWC, shift, axis=(0, 1)) + rng.normal(0, 12, picture_HWC.shape)
    return np.asarray(noisy.clip(0, 255), np.float32)


@lru_cache(maxsize=1)
def load_reader() -> DigitReader:
    """The reader, its classifier trained on the ``reader`` scans (about a second, once)."""
    from sklearn.svm import SVC

    scans = digits.load_scans("reader")
    rng = np.random.default_rng(_SEED)
    names = [list(digits.INKS), list(digits.PAPERS), list(digits.POSITIONS)]
    features, labels = [], []
    for drawing in range(_DRAWINGS):
        order = rng.permutation(len(scans.labels_N))
        for start in range(0, len(order), digits.MAX_DIGITS):
            few = scans.subset(order[start : start + digits.MAX_DIGITS])
            number = "".join(str(label) for label in few.labels_N)
            scene = digits.Scene(number, *(group[rng.integers(len(group))] for group in names))
            picture = digits.draw_array(scene, few, rng).astype(np.float32)
            page = _take_apart(_worn(picture, rng) if drawing else picture)
            if len(page.crops_NYX) == len(number):
                features.append(crop_features(page.crops_NYX))
                labels.append(few.labels_N)
    classifier = SVC(C=10.0, gamma="scale", random_state=_SEED)
    return DigitReader(classifier.fit(np.concatenate(features), np.concatenate(labels)))
