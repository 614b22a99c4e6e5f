"""Where a view lies in a picture as it is stored, and how the cut-out becomes upright.

Every decoder cuts and resizes the stored picture and turns the small result: that is cheap, and
EXIF's orientation means the same to all of them.

Legend: H height, W width, C = 3 channels; x to the right, y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from soar_mega.data.decode.interface import View

# EXIF's orientation -> (swap x and y, then mirror x, then mirror y) makes the picture upright.
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def swaps_sides(orientation: int) -> bool:
    """Whether a picture of this EXIF orientation (1 to 8) is stored on its side."""
    return _TURNS[orientation][0]


@dataclass(frozen=True)
class Placement:
    """What to cut out of a stored picture and what to do with it.

    Attributes:
        box: (left, top, right, bottom) in pixels of the stored picture; may be fractions.
        height: What the box is resized to, in pixels, before it is turned.
        width: The same.
        turn: Swap x and y, then mirror x, then mirror y.
    """

    box: tuple[float, float, float, float]
    height: int
    width: int
    turn: tuple[bool, bool, bool]

    def finish(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """The resized box turned upright and flipped as the view wants it; a contiguous copy."""
        swap, mirror_x, mirror_y = self.turn
        if swap:
            pixels_HWC = pixels_HWC.transpose(1, 0, 2)
        step_y, step_x = (-1 if mirror else 1 for mirror in (mirror_y, mirror_x))
        return np.array(pixels_HWC[::step_y, ::step_x], order="C")


def place(width: int, height: int, orientation: int, view: View) -> Placement:
    """The view's place in a stored picture of ``width`` x ``height`` pixels.

    The box starts on a whole pixel of the upright picture, so that one that needs no resizing
    keeps its pixels.
    """
    swap, mirror_x, mirror_y = _TURNS[orientation]
    if swap:
        width, height = height, width
    box_width, box_height = float(width), float(height)
    if width * view.height > height * view.width:
        box_width = height * view.width / view.height
    else:
        box_height = width * view.height / view.width
    left = float(math.floor(view.place * (width - box_width)))
    top = float(math.floor(view.place * (height - box_height)))
    # Back to the stored picture: mirrors first, as they were done last.
    xs, ys = (left, left + box_width), (top, top + box_height)
    if mirror_x:
        xs = (width - xs[1], width - xs[0])
    if mirror_y:
        ys = (height - ys[1], height - ys[0])
    if swap:
        xs, ys = ys, xs
    return Placement(
        box=(xs[0], ys[0], xs[1], ys[1]),
        height=view.width if swap else view.height,
        width=view.height if swap else view.width,
        turn=(swap, mirror_x != view.flip, mirror_y),
    )
