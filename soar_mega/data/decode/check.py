"""Could training use these picture bytes? By the decoder's own rules, for programs that look at
data without training."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from soar_mega.data.decode.pil import FORMATS, MAX_PIXELS, decode_image
from soar_mega.data.errors import BadSampleError, DataError

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap the sides


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


def read_header(data: bytes) -> Header:
    """The kind and the upright size; nothing is decoded.

    Raises:
        BadSampleError: No JPEG, PNG or WebP, too many pixels, or a damaged header.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                extension, (width, height) = EXTENSIONS[str(opened.format)], opened.size
                if width * height > MAX_PIXELS:
                    raise BadSampleError(
                        "too many pixels", f"{width} x {height}; limit {MAX_PIXELS}"
                    )
                on_its_side = opened.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    except BadSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise BadSampleError("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSampleError("not an image", "no JPEG, PNG or WebP") from error
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
        raise BadSampleError("truncated or damaged image", repr(error)) from error
    if on_its_side:
        width, height = height, width
    return Header(extension, width, height)


def check_decodes(data: bytes) -> None:
    """Decode the whole picture and drop the pixels.

    Raises:
        BadSampleError: The trainer's decoder does not take it.
    """
    try:
        decode_image(data, 16)
    except DataError as error:
        raise BadSampleError("truncated or damaged image", str(error.__cause__ or error)) from error


def thumbnail(data: bytes, side: int) -> Image.Image:
    """The whole picture, upright and RGB, at most ``side`` pixels wide and high; what is
    transparent is white.

    Raises:
        BadSampleError: See ``read_header`` and ``check_decodes``.
    """
    read_header(data)  # its limits come first
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.draft("RGB", (2 * side, 2 * side))
            picture = ImageOps.exif_transpose(opened)
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
            picture = picture.convert("RGBA")
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
        raise BadSampleError("truncated or damaged image", repr(error)) from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
