"""What every decoder does: picture bytes to pixels of a wanted size.

Legend: H height, W width, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from soar_mega.data.errors import BadSampleError


@dataclass(frozen=True)
class View:
    """What is made of a picture.

    The largest box of the aspect ratio ``width / height`` is cut out of the upright picture, and
    resized. It is as wide or as high as the picture; ``place`` says where it lies along the other
    side.

    Attributes:
        height: Of the result in pixels.
        width: Of the result in pixels.
        place: 0 is left or top, 1 is right or bottom, 0.5 the middle.
        flip: Mirror left and right, after cutting.
    """

    height: int
    width: int
    place: float = 0.5
    flip: bool = False


@dataclass(frozen=True)
class DecodeJob:
    """A picture's encoded bytes, what to make of it, and where it lies (for messages)."""

    data: bytes
    view: View
    where: str


# A decoded picture, uint8 (H, W, C) RGB: on the host, or a tensor on the decoder's GPU.
Pixels = np.ndarray | Tensor


class Decoder(Protocol):
    """Decodes many pictures at once; ``decode`` may be called from any one thread at a time."""

    def decode(self, jobs: Sequence[DecodeJob]) -> Sequence[Pixels | BadSampleError]:
        """uint8 (H, W, C) RGB of each job, or why it cannot be had; never raises for bad bytes."""

    def close(self) -> None:
        """Stop threads and free what the decoder holds."""
