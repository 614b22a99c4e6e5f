"""Pixels from good, odd and hostile picture bytes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soar_mega.data.decode.pil import MAX_PIXELS, decode_image
from soar_mega.data.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(64)))
        + chunk(b"IEND", b"")
    )


def test_a_picture_of_the_right_size_keeps_its_pixels() -> None:
    pixels_HWC = noise(16, 16)
    out = decode_image(encoded(Image.fromarray(pixels_HWC)), 16)
    assert out.dtype == torch.float32 and out.shape == (3, 16, 16) and out.is_contiguous()
    expected = torch.from_numpy(pixels_HWC).permute(2, 0, 1).double() / 127.5 - 1
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
    flipped = decode_image(encoded(Image.fromarray(pixels_HWC)), 16, flip=True)
    assert torch.equal(flipped, out.flip(2))


@pytest.mark.parametrize(("height", "width"), [(16, 22), (23, 16)])
def test_centre_crop_starts_on_a_whole_pixel(height: int, width: int) -> None:
    pixels_HWC = noise(height, width)
    top, left = (height - 16) // 2, (width - 16) // 2
    inner = np.ascontiguousarray(pixels_HWC[top : top + 16, left : left + 16])
    out = decode_image(encoded(Image.fromarray(pixels_HWC)), 16)
    assert torch.equal(out, decode_image(encoded(Image.fromarray(inner)), 16))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_resize_is_lanczos_of_the_whole_then_crop(kind: str) -> None:
    """Against resizing the shortest side first and cropping after."""
    image = Image.fromarray(noise(48, 64))
    expected = image.resize((32, 24), Image.Resampling.LANCZOS).crop((4, 0, 28, 24))
    options = {"lossless": True} if kind == "WEBP" else {}
    out = decode_image(encoded(image, kind, **options), 24)
    reference = decode_image(encoded(expected), 24)
    # PIL rounds between its two passes; a level of 255 is 2 / 255.
    assert float((out - reference).abs().max()) <= 2.1 / 255


def test_exif_rotation_is_applied() -> None:
    image = Image.fromarray(noise(16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    out = decode_image(encoded(image, exif=exif), 16)
    assert torch.equal(out, decode_image(encoded(image.rotate(-90)), 16))


def test_transparency_becomes_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (255, 0, 0, 255)
    out = decode_image(encoded(Image.fromarray(rgba)), 8)
    assert out[:, 0, 0].tolist() == [1, -1, -1] and out[:, 0, 7].tolist() == [1, 1, 1]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.paste(1, (4, 0, 8, 8))
    out = decode_image(encoded(palette, transparency=1), 8)
    assert out[:, 0, 0].tolist() == [-1, -1, 1] and out[:, 0, 7].tolist() == [1, 1, 1]
    grey = Image.new("LA", (8, 8), (0, 0))
    assert torch.equal(decode_image(encoded(grey), 8), torch.ones(3, 8, 8))


def test_grey_sixteen_bit_black_white_and_cmyk() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    deep = decode_image(encoded(Image.fromarray(ramp)), 8)
    shallow = Image.fromarray(np.rint(ramp / 257.0).astype(np.uint8))
    assert torch.equal(deep, decode_image(encoded(shallow), 8))
    assert torch.equal(deep[0], deep[2]) and float(deep.min()) == -1 and float(deep.max()) == 1
    bits = decode_image(encoded(Image.new("1", (8, 8), 1)), 8)
    assert torch.equal(bits, torch.ones(3, 8, 8))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    red = decode_image(encoded(cmyk, "JPEG"), 8)[:, 4, 4]
    assert red[0] > 0.9 and red[1] < -0.7 and red[2] < -0.7


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, 8)[:, 0, 0].tolist() == [-1, -1, 1]


def test_extreme_shapes_stay_small() -> None:
    assert decode_image(encoded(Image.new("RGB", (5000, 1))), 32).shape == (3, 32, 32)
    assert decode_image(encoded(Image.new("RGB", (1, 1))), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(60_000, 60_000), (MAX_PIXELS // 1000 + 1, 1000)])
def test_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"^s\.tar, key 'k': "):
        decode_image(bomb(*size), 16, where="s.tar, key 'k'")


def test_bomb_limit_is_ours() -> None:
    with pytest.raises(DataError, match=r"pixels; the limit is \d+ pixels, checked before"):
        decode_image(bomb(MAX_PIXELS // 1000 + 1, 1000), 16)


def bad_pictures() -> dict[str, bytes]:
    jpeg = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    png = encoded(Image.fromarray(noise(64, 64)))
    webp = encoded(Image.fromarray(noise(64, 64)), "WEBP")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty": b"",
        "text": b"this is no picture",
        "half jpeg": jpeg[: len(jpeg) // 2],
        "half png": png[: len(png) // 2],
        "half webp": webp[: len(webp) // 2],
        "corrupt png": bytes(flipped),
        "gif": encoded(Image.new("P", (8, 8)), "GIF"),
        "pickle": b"\x80\x04\x95cos\nsystem\n",
    }


@pytest.mark.parametrize("name", sorted(bad_pictures()))
def test_bad_bytes_name_shard_and_key(name: str) -> None:
    with pytest.raises(DataError, match=r"^s\.tar, key 'k': not a complete"):
        decode_image(bad_pictures()[name], 16, where="s.tar, key 'k'")


def test_the_extension_does_not_matter(tmp_path: Path) -> None:
    """A WebP called .jpg is a WebP: only the bytes count."""
    assert decode_image(encoded(Image.new("RGB", (8, 8)), "WEBP"), 8).shape == (3, 8, 8)
