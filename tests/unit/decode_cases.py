"""Pictures and hostile files for the tests of decoding."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shades with hard edges, fine lines and sensor noise; no symmetry."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = 127 + 100 * np.sin(x / width * 9) * np.cos(y / height * 7)
    pixels_HWC = np.stack([waves, 255 * x / width, 255 * y / height], axis=-1)
    for _ in range(12):
        top, left = random.integers(0, height), random.integers(0, width)
        box = (slice(top, top + height // 6), slice(left, left + width // 6))
        pixels_HWC[box] = random.integers(0, 256, 3)
    pixels_HWC[:: max(height // 10, 2)] *= 0.5
    pixels_HWC += random.normal(0, 5, pixels_HWC.shape)
    return pixels_HWC.clip(0, 255).astype(np.uint8)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def jpeg_bomb(width: int, height: int) -> bytes:
    """A whole small JPEG whose frame claims a huge picture."""
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_bombs(side: int) -> dict[str, bytes]:
    """WebP of each kind of header, claiming ``side`` x ``side``."""
    lossy = bytearray(encoded(noise(16, 16), "WEBP"))
    lossy[26:30] = struct.pack("<HH", side, side)
    lossless = bytearray(encoded(noise(16, 16), "WEBP", lossless=True))
    kept = int.from_bytes(lossless[21:25], "little") >> 28 << 28
    lossless[21:25] = (kept | side - 1 | side - 1 << 14).to_bytes(4, "little")
    frames = [Image.fromarray(noise(16, 16)), Image.new("RGB", (16, 16))]
    moving = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert (lossy[12:16], lossless[12:16], moving[12:16]) == (b"VP8 ", b"VP8L", b"VP8X")
    moving[24:30] = (side - 1).to_bytes(3, "little") * 2
    return {"lossy": bytes(lossy), "lossless": bytes(lossless), "animated": bytes(moving)}
