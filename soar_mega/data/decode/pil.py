"""Image bytes to pixels with PIL: (3, H, W) fp32 in [-1, 1].

Only JPEG, PNG and WebP are opened, whatever the member is called; of an animation the first frame
counts. The header's pixel count is checked before anything is decoded.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from soar_mega.data.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 2**26  # 67 million: above any camera's picture, 200 MB decoded


def decode_image(
    data: bytes, resolution: int, *, flip: bool = False, where: str = "image"
) -> Tensor:
    """Decode, bring upright, resize the shortest side to ``resolution`` and crop the centre.

    Args:
        data: The encoded image.
        resolution: Side of the square result in pixels.
        flip: Mirror left and right (the caller draws it).
        where: Shard and key, for messages.

    Returns:
        (3, resolution, resolution) fp32 in [-1, 1], RGB.

    Raises:
        DataError: Not a complete JPEG, PNG or WebP, or more than ``MAX_PIXELS`` pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{where}: {width} x {height} pixels; the limit is {MAX_PIXELS} pixels, "
                    "checked before decoding. Make the picture smaller or remove the sample."
                )
            picture = _square(_to_rgb(ImageOps.exif_transpose(opened)), resolution)
    except DataError:
        raise
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
        raise DataError(
            f"{where}: not a complete JPEG, PNG or WebP picture ({len(data)} bytes): "
            f"{type(error).__name__}: {error}. Replace or remove the sample."
        ) from error
    pixels_HWC = np.asarray(picture, dtype=np.float32)
    if flip:
        pixels_HWC = pixels_HWC[:, ::-1]
    # numpy, not torch: this runs in many small threads, and torch would start its own in each.
    scaled_CHW = np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
    scaled_CHW *= np.float32(1 / 127.5)
    scaled_CHW -= np.float32(1)
    return torch.from_numpy(scaled_CHW)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip, not scale
        wide_HW = np.asarray(picture).astype(np.float32)
        picture = Image.fromarray(np.clip(np.rint(wide_HW / 257), 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _square(picture: Image.Image, resolution: int) -> Image.Image:
    """Resize and crop in one call: the filter still sees the pixels around the box. The box starts
    on a whole pixel, so a picture of the right size stays as it is."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    if side == resolution:
        return picture.crop((left, top, left + side, top + side))
    box = (left, top, left + side, top + side)
    return picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
