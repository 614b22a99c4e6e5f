"""Could training use these picture bytes? By the decoder's own rules, for programs that look at
data without training."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from soar_mega.data.decode.geometry import swaps_sides
from soar_mega.data.decode.interface import View
from soar_mega.data.decode.pil import DAMAGED, decode_one, open_picture, orientation
from soar_mega.data.errors import BadSampleError

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_SMALL = View(16, 16)


@dataclass(frozen=True)
class Header:
    """What a picture says of itself.

    Attributes:
        extension: jpg, png or webp, by what the bytes are, whatever the file was called.
        width, height: In pixels, upright.
    """

    extension: str
    width: int
    height: int


def read_header(data: bytes, where: str = "picture") -> Header:
    """The kind and the upright size; of JPEGs nothing is decoded.

    Raises:
        BadSampleError: No JPEG, PNG or WebP, too many pixels, or damaged.
    """
    opened = open_picture(data, where)
    extension, (width, height) = EXTENSIONS[str(opened.format)], opened.size
    try:
        if swaps_sides(orientation(opened)):
            width, height = height, width
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
        raise BadSampleError(DAMAGED, f"{where}: {type(error).__name__}: {error}") from error
    return Header(extension, width, height)


def check_decodes(data: bytes, where: str = "picture") -> None:
    """Decode the whole picture and drop the pixels.

    Raises:
        BadSampleError: The trainer's decoder does not take it.
    """
    decode_one(data, _SMALL, where)


def thumbnail(data: bytes, side: int) -> Image.Image:
    """The whole picture, upright and RGB, at most ``side`` pixels wide and high.

    Raises:
        BadSampleError: The trainer's decoder does not take it.
    """
    header = read_header(data)
    scale = side / max(header.width, header.height, side)
    view = View(max(round(header.height * scale), 1), max(round(header.width * scale), 1))
    return Image.fromarray(decode_one(data, view, "picture"))
