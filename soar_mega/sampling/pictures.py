"""Pixels to pictures.

Legend: B pictures, H/W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

_GAP = 2


def to_pictures(pixels_B3HW: Tensor) -> list[Image.Image]:
    """8-bit RGB pictures from pixels in [-1, 1] (values outside are clamped)."""
    scaled = (pixels_B3HW.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in scaled]


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures (of one size) on one white sheet, row by row, a small gap between them.

    Args:
        pictures: At least one.
        columns: Pictures in a row; None: as square as possible.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    size = (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    sheet = Image.new("RGB", size, "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * (width + _GAP), row * (height + _GAP)))
    return sheet
