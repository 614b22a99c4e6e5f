"""Pixels from good, odd and hostile picture bytes, by every decoder."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from soar_mega.data.decode import pil
from soar_mega.data.decode.interface import DecodeJob, Decoder, View
from soar_mega.data.decode.make import make_decoder
from soar_mega.data.decode.model_range import to_model_range
from soar_mega.data.decode.pil import MAX_JPEG_SCANS, MAX_PIXELS, PilDecoder, decode_one
from soar_mega.data.errors import BadSampleError, DataError
from tests.unit.decode_cases import (
    encoded,
    exif_of,
    jpeg_bomb,
    noise,
    photo,
    png_bomb,
    webp_bombs,
)

WHERE = "s.tar, key 'k'"


@pytest.fixture(params=["pil", "dali"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    made = make_decoder(request.param, 2, batch_size=4)
    yield made
    made.close()


def decode(picture: Image.Image | np.ndarray | bytes, side: int, **options: object) -> np.ndarray:
    data = picture if isinstance(picture, bytes) else encoded(picture)
    return decode_one(data, View(side, side, **options), WHERE)  # type: ignore[arg-type]


# --- geometry and colour ----------------------------------------------------------------------


def test_a_picture_of_the_right_size_keeps_its_pixels() -> None:
    pixels_HWC = noise(16, 16)
    out = decode(pixels_HWC, 16)
    assert out.dtype == np.uint8 and out.flags.c_contiguous and out.flags.writeable
    assert np.array_equal(out, pixels_HWC)
    assert np.array_equal(decode(pixels_HWC, 16, flip=True), pixels_HWC[:, ::-1])


@pytest.mark.parametrize(("height", "width"), [(16, 22), (23, 16)])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 1.0])
def test_a_crop_starts_on_a_whole_pixel(height: int, width: int, place: float) -> None:
    pixels_HWC = noise(height, width)
    top, left = int((height - 16) * place), int((width - 16) * place)
    inner = pixels_HWC[top : top + 16, left : left + 16]
    assert np.array_equal(decode(pixels_HWC, 16, place=place), inner)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_resize_is_lanczos_of_the_whole_then_crop(kind: str) -> None:
    """Against resizing the shortest side first and cropping after."""
    image = Image.fromarray(noise(48, 64))
    expected = image.resize((32, 24), Image.Resampling.LANCZOS).crop((4, 0, 28, 24))
    options = {"lossless": True} if kind == "WEBP" else {}
    out = decode(encoded(image, kind, **options), 24).astype(int)
    assert np.abs(out - np.asarray(expected)).max() <= 1  # PIL rounds between its two passes


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_before_cropping(kind: str, orientation: int) -> None:
    stored = encoded(photo(20, 31), kind, exif=exif_of(orientation), lossless=True, quality=95)
    with Image.open(io.BytesIO(stored)) as opened:
        pixels_HWC = np.asarray(opened.convert("RGB"))
    turn = {
        2: np.fliplr,
        3: lambda p: np.rot90(p, 2),
        4: np.flipud,
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    upright = turn.get(orientation, lambda p: p)(pixels_HWC)
    height, width = upright.shape[:2]
    rows, columns = (slice(3, 23), slice(20)) if height > width else (slice(20), slice(3, 23))
    assert np.array_equal(decode(stored, 20, place=0.3), upright[rows, columns])
    assert np.array_equal(decode(stored, 20, place=0.3, flip=True), upright[rows, columns][:, ::-1])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest undoes our filter
def test_an_orientation_that_is_none_is_no_fault() -> None:
    pixels_HWC = noise(8, 8)
    for exif in (exif_of(0), exif_of(9), b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"):
        assert np.array_equal(decode(encoded(pixels_HWC, exif=exif), 8), pixels_HWC)
        assert decode(encoded(pixels_HWC, "JPEG", exif=exif), 8).shape == (8, 8, 3)


def test_odd_metadata_is_no_news() -> None:
    """Nothing is printed about it for each of a million pictures."""
    code = (
        "import sys; from soar_mega.data.decode import pil, interface;"
        "pil.decode_one(sys.stdin.buffer.read(), interface.View(8, 8), '')"
    )
    data = encoded(noise(8, 8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, input=data, capture_output=True, check=True).stderr == b""


def test_transparency_becomes_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (255, 0, 0, 255)
    out = decode(rgba, 8)
    assert out[0, 0].tolist() == [255, 0, 0] and out[0, 7].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.paste(1, (4, 0, 8, 8))
    out = decode(encoded(palette, transparency=1), 8)
    assert out[0, 0].tolist() == [0, 0, 255] and out[0, 7].tolist() == [255, 255, 255]
    assert (decode(Image.new("LA", (8, 8), (0, 0)), 8) == 255).all()


def test_grey_sixteen_bit_black_white_and_cmyk() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    shallow = np.rint(ramp / 257.0).astype(np.uint8)
    assert np.array_equal(decode(ramp, 8), np.stack([shallow] * 3, axis=-1))
    assert (decode(Image.new("1", (8, 8), 1), 8) == 255).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    red = decode(encoded(cmyk, "JPEG"), 8)[4, 4]
    assert red[0] > 240 and red[1] < 40 and red[2] < 40


def test_extreme_shapes_stay_small() -> None:
    assert decode(Image.new("RGB", (5000, 1)), 32).shape == (32, 32, 3)
    assert decode(Image.new("RGB", (1, 1)), 32).shape == (32, 32, 3)
    jpeg = encoded(Image.new("RGB", (5000, 1), "white"), "JPEG")
    assert decode_one(jpeg, View(1, 4000), WHERE).min() == 255


def test_to_model_range() -> None:
    pixels_BHWC = torch.arange(256, dtype=torch.uint8).repeat(3).view(2, 8, 16, 3)
    out = to_model_range(pixels_BHWC)
    assert out.shape == (2, 3, 8, 16) and out.dtype == torch.float32 and out.is_contiguous()
    expected = pixels_BHWC.permute(0, 3, 1, 2).double() / 127.5 - 1
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
    assert float(out.min()) == -1 and float(out.max()) == 1


# --- the scale of JPEGs -----------------------------------------------------------------------


def test_jpegs_are_decoded_at_the_smallest_scale_that_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, int]] = []
    draft = JpegImageFile.draft

    def spy(self: JpegImageFile, *args: object) -> object:
        result = draft(self, *args)  # type: ignore[arg-type]
        sizes.append(self.size)
        return result

    monkeypatch.setattr(JpegImageFile, "draft", spy)
    whole = photo(263, 397)
    upright = encoded(whole, "JPEG", quality=95)
    on_its_side = encoded(whole, "JPEG", quality=95, exif=exif_of(6))
    views = {263: None, 132: None, 131: 2, 66: 2, 65: 4, 33: 4, 32: 8, 8: 8}
    for side, scale in views.items():
        for data in (upright, on_its_side):
            sizes.clear()
            decode(data, side)
            assert sizes == ([] if scale is None else [(-(-397 // scale), -(-263 // scale))])
    sizes.clear()
    decode(encoded(photo(64, 80), "JPEG"), 32)  # half of it exactly
    assert sizes == [(40, 32)]
    sizes.clear()
    decode_one(upright, View(50, 198), WHERE)  # the box is 397 x 100.25
    decode_one(upright, View(50, 199), WHERE)  # one pixel more than half of it
    assert sizes == [(199, 132)]


def test_scaled_decoding_shows_the_same_box() -> None:
    """A box wrong by one pixel of the source would make a mean difference of 2 in one channel."""
    height, width = 331, 517
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [125 + 120 * np.sin(along / 35) for along in (x, y, x + y)]
    smooth = np.stack(waves, axis=-1).astype(np.uint8)
    for orientation in range(1, 9):
        exif = exif_of(orientation)
        data = encoded(smooth, "JPEG", quality=98, subsampling=0, exif=exif)
        with Image.open(io.BytesIO(data)) as opened:
            lossless = encoded(np.asarray(opened), exif=exif, compress_level=1)
        for view in (View(40, 40, 0.9), View(33, 70, 0.2, True), View(150, 100, 0.4)):
            scaled, whole = (decode_one(d, view, WHERE).astype(int) for d in (data, lossless))
            assert np.abs(scaled - whole).mean((0, 1)).max() <= 1


# --- failure cases, by every decoder ------------------------------------------------------------


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(noise(64, 64), "JPEG")
    progressive = encoded(noise(64, 64), "JPEG", progressive=True)
    png = encoded(noise(64, 64))
    webp = encoded(noise(64, 64), "WEBP")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    scan = jpeg.index(b"\xff\xda")
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    decode(progressive[:-2] + last_scan * 20 + b"\xff\xd9", 16)  # no fault in itself
    tables = bytearray(jpeg)
    table = jpeg.index(b"\xff\xc4")
    tables[table + 5 : table + 21] = b"\xff" * 16  # more codes than there can be
    return {
        "empty": (b"", pil.NOT_AN_IMAGE),
        "text": (b"this is no picture", pil.NOT_AN_IMAGE),
        "gif": (encoded(Image.new("P", (8, 8)), "GIF"), pil.NOT_AN_IMAGE),
        "pickle": (b"\x80\x04\x95cos\nsystem\n", pil.NOT_AN_IMAGE),
        "half jpeg": (jpeg[: len(jpeg) // 2], pil.DAMAGED),
        "half progressive jpeg": (progressive[: len(progressive) // 3], pil.DAMAGED),
        "jpeg without its end": (jpeg[:-2], pil.DAMAGED),
        "jpeg cut in its header": (jpeg[:100], pil.DAMAGED),
        "jpeg without a scan": (jpeg[:scan] + b"\xff\xd9", pil.DAMAGED),
        "jpeg of bad tables": (bytes(tables), pil.DAMAGED),
        "jpeg of many scans": (
            progressive[:-2] + last_scan * MAX_JPEG_SCANS + b"\xff\xd9",
            pil.DAMAGED,
        ),
        "half png": (png[: len(png) // 2], pil.DAMAGED),
        "corrupt png": (bytes(flipped), pil.DAMAGED),
        "png signature": (png[:8], pil.DAMAGED),
        "half webp": (webp[: len(webp) // 2], pil.DAMAGED),
        "webp signature": (webp[:12], pil.DAMAGED),
    }


@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_scans_are_counted_over_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pil, "_BLOCK", block)
    for end in range(8):
        data = b"\xff\xda\xff\xff\xda\xda\xff" * 30 + b"\xff\xda"
        assert pil._scans(data[: len(data) - end]) == data[: len(data) - end].count(b"\xff\xda")


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """Bytes, and what must come of them at 16 x 16."""
    pixels_HWC = photo(16, 16)
    frames = [Image.fromarray(pixels_HWC), Image.new("RGB", (16, 16))]
    rgba = np.concatenate([pixels_HWC, np.full((16, 16, 1), 255, np.uint8)], axis=-1)
    rgba[:, 8:, 3] = 0
    on_white = pixels_HWC.copy()
    on_white[:, 8:] = 255
    wide = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    blue = Image.new("CMYK", (16, 16), (255, 255, 0, 0))
    jpeg = {"format": "JPEG", "quality": 100, "subsampling": 0}
    flat = Image.new("RGB", (16, 16), (200, 120, 40))
    second = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]}

    def of(image: Image.Image, **options: object) -> bytes:
        return encoded(image, str(options.pop("format")), **options)

    def grey(values: np.ndarray) -> np.ndarray:
        return np.stack([values] * 3, axis=-1).astype(np.uint8)

    return {
        "cmyk jpeg": (of(blue, **jpeg), np.full((16, 16, 3), (0, 0, 255))),
        "grey jpeg": (of(Image.fromarray(wide // 257).convert("L"), **jpeg), grey(wide // 257)),
        "rgb jpeg": (of(flat, **jpeg, keep_rgb=True), np.asarray(flat)),
        "jpeg with a preview": (of(flat, **{**jpeg, **second, "format": "MPO"}), np.asarray(flat)),
        "rotated jpeg": (of(frames[0], **jpeg, exif=exif_of(6)), np.rot90(pixels_HWC, -1)),
        "16-bit png": (encoded(wide), grey(np.rint(wide / 257))),
        "png with alpha": (encoded(rgba), on_white),
        "animated png": (encoded(frames[0], save_all=True, append_images=frames[1:]), pixels_HWC),
        "animated webp": (
            encoded(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:]),
            pixels_HWC,
        ),
        "png, whatever it is called": (encoded(pixels_HWC), pixels_HWC),
    }


def surrounded(decoder: Decoder, data: bytes) -> np.ndarray | BadSampleError:
    """Decode ``data`` between good pictures, which must come out right."""
    shade = np.full((48, 64, 3), (90, 160, 210), np.uint8)
    good = encoded(shade, "JPEG", quality=95)
    jobs = [DecodeJob(d, View(16, 16), WHERE) for d in (good, data, good, encoded(shade))]
    first, result, *others = decoder.decode(jobs)
    for other in (first, *others):
        assert isinstance(other, np.ndarray) and other.shape == (16, 16, 3)
        assert np.abs(other.astype(int) - shade[0, 0]).max() <= 3
    return result


@pytest.mark.parametrize("name", sorted(bad_pictures()))
def test_bad_bytes_cost_themselves_only(decoder: Decoder, name: str) -> None:
    data, kind = bad_pictures()[name]
    result = surrounded(decoder, data)
    assert isinstance(result, BadSampleError) and result.kind == kind
    assert str(result).startswith(f"{WHERE}: not a complete") and "emove the sample" in str(result)
    with pytest.raises(BadSampleError, match="not a complete"):
        decode(data, 16)


@pytest.mark.parametrize("name", sorted(odd_pictures()))
def test_odd_pictures_come_out_right(decoder: Decoder, name: str) -> None:
    data, expected = odd_pictures()[name]
    result = surrounded(decoder, data)
    assert isinstance(result, np.ndarray)
    error = np.abs(result.astype(int) - expected)
    assert error.mean() <= 3 and (error.max() == 0 or data[:3] == b"\xff\xd8\xff")


@contextmanager
def little_memory(allowed: int) -> Iterator[None]:
    """No more than ``allowed`` bytes of address space may be taken."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + allowed, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def bombs() -> dict[str, bytes]:
    jpeg = jpeg_bomb(16, 16)
    frame, scan = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    second = bytearray(jpeg[frame : frame + 19])
    second[5:9] = b"\xff\xdc" * 2
    return {
        "png of 3600 megapixels": png_bomb(60_000, 60_000),
        "png just above the limit": png_bomb(MAX_PIXELS // 1000 + 1, 1000),
        "jpeg of 4 gigapixels": jpeg_bomb(65_500, 65_500),
        "jpeg just above the limit": jpeg_bomb(2**13 + 1, 2**13),
        "jpeg of two frames": jpeg[:scan] + bytes(second) + jpeg[scan:],
        **{f"{kind} webp": data for kind, data in webp_bombs(16_383).items()},
    }


@pytest.mark.parametrize("name", sorted(bombs()))
def test_bombs_are_refused_from_their_headers(decoder: Decoder, name: str) -> None:
    surrounded(decoder, b"")  # threads and buffers are there
    with warnings.catch_warnings(), little_memory(1 << 27):
        warnings.simplefilter("error")
        result = surrounded(decoder, bombs()[name])
    assert isinstance(result, BadSampleError) and result.kind == pil.TOO_MANY_PIXELS
    assert f"the limit is {MAX_PIXELS} pixels, checked before decoding" in str(result)


# --- many at once -----------------------------------------------------------------------------


def test_threads_change_nothing_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [DecodeJob(encoded(photo(40 + n, 50, n)), View(16, 24), str(n)) for n in range(9)]
    jobs.insert(4, DecodeJob(b"bad", View(16, 24), "bad"))
    alone = PilDecoder().decode(jobs)
    names: set[str] = set()
    decode_job = decode_one

    def spy(data: bytes, view: View, where: str) -> np.ndarray:
        names.add(threading.current_thread().name.rpartition("_")[0])
        return decode_job(data, view, where)

    monkeypatch.setattr(pil, "decode_one", spy)
    threaded = PilDecoder(3)
    for _ in range(2):
        together = threaded.decode(jobs)
        assert [str(r) for r in alone if isinstance(r, BadSampleError)] == [str(together.pop(4))]
        expected = [r for r in alone if not isinstance(r, BadSampleError)]
        assert all(np.array_equal(a, b) for a, b in zip(expected, together, strict=True))
    assert names == {"decode"}
    threaded.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode_")]


def test_no_jobs(decoder: Decoder) -> None:
    assert decoder.decode([]) == []


def test_dali_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"data\.decoder = dali: .*pip install soar-mega\[dali\]"):
        make_decoder("dali", 1)
