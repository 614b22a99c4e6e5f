"""Picture bytes to pixels with PIL.

Only JPEG, PNG and WebP are opened, whatever the member is called; of an animation the first frame
counts. Sizes in headers are checked before anything is decoded.

Legend: H height, W width, C = 3 channels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from soar_mega.data.decode.geometry import Placement, place
from soar_mega.data.decode.interface import DecodeJob, View
from soar_mega.data.errors import BadSampleError

MAX_PIXELS = 2**26  # 67 million: above any camera's picture, 200 MB decoded
MAX_JPEG_SCANS = 500  # each scan of a progressive JPEG costs a pass over all its pixels

NOT_AN_IMAGE = "not an image"
DAMAGED = "truncated or damaged image"
TOO_MANY_PIXELS = "too many pixels"

_BLOCK = 2**18  # bytes looked at at once: the masks stay in the processor's cache
_ORIENTATION = 0x0112  # EXIF's tag

# PIL warns of odd metadata around good pixels. A filter for good: threads cannot share one that is
# put on and off.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.\w+ImagePlugin$")


class PilDecoder:
    """Decodes with PIL; a ``Decoder``.

    Args:
        num_threads: Threads of its own; 0 decodes in the caller's.
    """

    def __init__(self, num_threads: int = 0) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "decode") if num_threads else None

    def decode(self, jobs: Sequence[DecodeJob]) -> list[np.ndarray | BadSampleError]:
        """uint8 (H, W, C) RGB of each job, or why it cannot be had."""
        return list(map(_try, jobs) if self._pool is None else self._pool.map(_try, jobs))

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _try(job: DecodeJob) -> np.ndarray | BadSampleError:
    try:
        return decode_one(job.data, job.view, job.where)
    except BadSampleError as error:
        return error


def decode_one(data: bytes, view: View, where: str) -> np.ndarray:
    """One picture's uint8 (H, W, C) RGB pixels.

    Args:
        data: The encoded picture.
        view: What to make of it.
        where: Where it lies, for messages.

    Raises:
        BadSampleError: "not an image", "too many pixels" or "truncated or damaged image".
    """
    return decode_opened(open_picture(data, where), view, where)


def open_picture(data: bytes, where: str) -> ImageFile.ImageFile:
    """The picture with its header read and nothing decoded.

    Raises:
        BadSampleError: No JPEG, PNG or WebP, a damaged header, or more than ``MAX_PIXELS`` pixels.
    """
    # Not Image.open: it warns of pixels before our check, and takes JPEGs with a preview (MPO) or
    # a depth map for another format.
    plugin: type[ImageFile.ImageFile]
    if data.startswith(b"\xff\xd8\xff"):
        plugin = JpegImageFile
        scans = _scans(data)
        if scans > MAX_JPEG_SCANS:
            raise _damaged(where, f"a JPEG of {scans} scans; the limit is {MAX_JPEG_SCANS}")
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        plugin = PngImageFile
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        plugin = WebPImageFile
        canvas = _webp_canvas(data)
        if canvas is None:
            raise _damaged(where, "its WebP header is damaged")
        _check_pixels(*canvas, where)  # opening it already takes memory for all pixels
    else:
        raise BadSampleError(
            NOT_AN_IMAGE,
            f"{where}: not a complete JPEG, PNG or WebP picture ({len(data)} bytes): it starts as "
            "none of them. Replace or remove the sample.",
        )
    try:
        opened = plugin(io.BytesIO(data))
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
        raise _damaged(where, f"{type(error).__name__}: {error}") from error
    _check_pixels(*opened.size, where)
    return opened


def orientation(opened: ImageFile.ImageFile) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none that can be read.

    Raises:
        Exception: It lies behind the pixels of a PNG, and those cannot be decoded.
    """
    if not isinstance(opened, JpegImageFile):
        opened.load()
    try:
        value = opened.getexif().get(_ORIENTATION)
    except Exception:  # odd metadata does not make the picture bad
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def decode_opened(opened: ImageFile.ImageFile, view: View, where: str) -> np.ndarray:
    """``decode_one`` of what ``open_picture`` gave; the picture's size is not to be used after.

    Raises:
        BadSampleError: "truncated or damaged image".
    """
    try:
        placement = place(*opened.size, orientation(opened), view)
        scale = _draft(opened, placement) if isinstance(opened, JpegImageFile) else 1
        return placement.finish(_cut(_to_rgb(opened), placement, scale))
    except Exception as error:  # as above
        raise _damaged(where, f"{type(error).__name__}: {error}") from error


def _draft(opened: JpegImageFile, placement: Placement) -> int:
    """Tell the JPEG decoder to leave out what the result is too small to show; how many times."""
    left, _, right, _ = placement.box  # its shape is the result's, so one side tells
    most = (right - left) / placement.width
    scale = next((scale for scale in (8, 4, 2) if scale <= most), 1)
    if scale > 1 and opened.draft(None, (opened.width // scale, opened.height // scale)) is None:
        return 1
    return scale


def _cut(picture: Image.Image, placement: Placement, scale: int) -> np.ndarray:
    """Resize and crop in one call: the filter still sees the pixels around the box."""
    size = (placement.width, placement.height)
    # A decoder that scales rounds sizes up, but its pixels are exactly ``scale`` wide.
    left, top, right, bottom = (edge / scale for edge in placement.box)
    if (right - left, bottom - top) == size and left.is_integer() and top.is_integer():
        picture = picture.crop((int(left), int(top), int(right), int(bottom)))
    else:
        picture = picture.resize(size, Image.Resampling.LANCZOS, (left, top, right, bottom))
    return np.asarray(picture)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip, not scale
        wide_HW = np.asarray(picture).astype(np.float32)
        picture = Image.fromarray(np.clip(np.rint(wide_HW / 257), 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _scans(data: bytes) -> int:
    """How many scans a JPEG starts; ``data.count`` of the marker takes five times as long."""
    bytes_N = np.frombuffer(data, np.uint8)
    blocks = (bytes_N[start : start + _BLOCK + 1] for start in range(0, len(data), _BLOCK))
    return sum(int(np.count_nonzero((b[:-1] == 0xFF) & (b[1:] == 0xDA))) for b in blocks)


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """(width, height) from the first chunk; None where there is none."""
    kind, header = data[12:16], data[20:30]
    if kind == b"VP8X" and len(header) == 10:
        width, height = (int.from_bytes(header[n : n + 3], "little") + 1 for n in (4, 7))
        return width, height
    if kind == b"VP8 " and len(header) == 10 and header[3:6] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(header[n : n + 2], "little") & 0x3FFF for n in (6, 8))
        return width, height
    if kind == b"VP8L" and len(header) >= 5 and header[0] == 0x2F:
        bits = int.from_bytes(header[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _check_pixels(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise BadSampleError(
            TOO_MANY_PIXELS,
            f"{where}: {width} x {height} pixels; the limit is {MAX_PIXELS} pixels, "
            "checked before decoding. Make the picture smaller or remove the sample.",
        )


def _damaged(where: str, why: str) -> BadSampleError:
    return BadSampleError(
        DAMAGED,
        f"{where}: not a complete JPEG, PNG or WebP picture: {why}. Replace or remove the sample.",
    )
