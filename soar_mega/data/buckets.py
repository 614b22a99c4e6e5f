"""Aspect-ratio buckets: the few sizes that pictures are brought to.

Legend: N pictures, K buckets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from soar_mega.config.schema import RESOLUTION_STEP


class Bucket(NamedTuple):
    """A size in pixels."""

    width: int
    height: int


def make_buckets(resolution: int, max_aspect_ratio: float) -> tuple[Bucket, ...]:
    """Sizes of at most ``resolution**2`` pixels, by rising aspect ratio; one of them is the square.

    Sides are multiples of a sixteenth of the resolution (of 16 pixels at least), so that there are
    about ten sizes up to 2:1 whatever the resolution.

    Args:
        resolution: Side of the square in pixels, a multiple of 16.
        max_aspect_ratio: Longest side over the shortest, at least 1; 1 leaves the square alone.
    """
    step = max(resolution // 16 // RESOLUTION_STEP * RESOLUTION_STEP, RESOLUTION_STEP)
    wide: dict[int, int] = {}  # height -> the largest width that fits
    for width in range(resolution + step, int(resolution * max_aspect_ratio) + 1, step):
        height = resolution**2 // width // step * step
        if height and width / height <= max_aspect_ratio:
            wide[height] = width
    landscape = [Bucket(width, height) for height, width in wide.items()]
    portrait = [Bucket(height, width) for width, height in landscape]
    square = Bucket(resolution, resolution)
    return tuple(sorted([*portrait, square, *landscape], key=lambda b: b.width / b.height))


def bucket_of(buckets: tuple[Bucket, ...], sizes_N2: np.ndarray) -> np.ndarray:
    """The bucket whose aspect ratio is nearest (as a ratio) to each picture's.

    Args:
        buckets: By rising aspect ratio.
        sizes_N2: Upright width and height; where one is 0 the size is unknown.

    Returns:
        int64 (N,) places in ``buckets``; the squarest for unknown sizes.
    """
    ratios_K = np.log([bucket.width / bucket.height for bucket in buckets])
    known_N = np.logical_and(sizes_N2[:, 0] > 0, sizes_N2[:, 1] > 0)
    safe_N2 = np.where(known_N[:, None], sizes_N2, 1).astype(np.float64)
    wanted_N = np.log(safe_N2[:, 0] / safe_N2[:, 1])
    borders = (ratios_K[1:] + ratios_K[:-1]) / 2
    return np.searchsorted(borders, wanted_N).astype(np.int64)
