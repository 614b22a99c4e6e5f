"""What DALI sees and what not, how it recovers, and how its pixels differ from PIL's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from soar_mega.data.decode import dali as dali_module
from soar_mega.data.decode import pil
from soar_mega.data.decode.dali import DaliDecoder, Filter
from soar_mega.data.decode.geometry import place
from soar_mega.data.decode.interface import DecodeJob, View
from soar_mega.data.decode.jpeg import plain_jpeg_size
from soar_mega.data.decode.pil import PilDecoder, decode_one
from soar_mega.data.errors import BadSampleError
from tests.unit.decode_cases import encoded, exif_of, noise, photo

pytest.importorskip("nvidia.dali")

WHERE = "s.tar, key 'k'"


@pytest.fixture
def left_to_pil(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of ``decode`` left to PIL."""
    counts: list[int] = []
    decode = PilDecoder.decode

    def spy(self: PilDecoder, jobs: list[DecodeJob]) -> list[np.ndarray | BadSampleError]:
        counts.append(len(jobs))
        return decode(self, jobs)

    monkeypatch.setattr(PilDecoder, "decode", spy)
    return counts


@pytest.fixture
def decoder() -> Iterator[DaliDecoder]:
    made = DaliDecoder(num_threads=2, batch_size=4)
    yield made
    made.close()


def pixels_of(results: list[np.ndarray | BadSampleError]) -> list[np.ndarray]:
    found = [result for result in results if isinstance(result, np.ndarray)]
    assert len(found) == len(results), results
    return found


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, int, float]:
    """(mean, maximum, PSNR in dB) of two pictures' difference, in levels of 255."""
    error = np.abs(a.astype(int) - b.astype(int))
    return error.mean(), int(error.max()), 10 * np.log10(255**2 / max((error**2).mean(), 1e-3))


def halved_first(job: DecodeJob) -> np.ndarray:
    """With PIL what DALI does: 2 x 2 pixels are averaged where the box is twice the result."""
    opened = pil.open_picture(job.data, job.where)
    placement = place(*opened.size, pil.orientation(opened), job.view)
    picture = pil._to_rgb(opened)
    scale = 2 if placement.box[2] - placement.box[0] >= 2 * placement.width else 1
    picture = picture.reduce(2) if scale == 2 else picture
    return placement.finish(pil._cut(picture, placement, scale))


# --- what DALI sees ---------------------------------------------------------------------------


def plain_jpegs() -> dict[str, bytes]:
    pixels_HWC = photo(45, 61)
    grey = Image.fromarray(pixels_HWC).convert("L")
    first = Image.fromarray(pixels_HWC)
    with_preview = {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}
    jpeg = {"quality": 95}
    return {
        "4:4:4": encoded(pixels_HWC, "JPEG", subsampling=0, **jpeg),
        "4:2:2": encoded(pixels_HWC, "JPEG", subsampling=1, **jpeg),
        "4:2:0": encoded(pixels_HWC, "JPEG", subsampling=2, **jpeg),
        "progressive": encoded(pixels_HWC, "JPEG", progressive=True, **jpeg),
        "restarts": encoded(pixels_HWC, "JPEG", restart_marker_blocks=2, **jpeg),
        "grey": encoded(grey, "JPEG", **jpeg),
        "rgb": encoded(pixels_HWC, "JPEG", keep_rgb=True, **jpeg),
        "comment and profile": encoded(
            pixels_HWC, "JPEG", comment=b"\xff\xd9\xff\xda", icc_profile=bytes(70_000), **jpeg
        ),
        "preview": encoded(first, "MPO", **with_preview, **jpeg),
        "bytes behind its end": encoded(pixels_HWC, "JPEG", **jpeg) + b"more",
    }


@pytest.mark.parametrize("name", sorted(plain_jpegs()))
@pytest.mark.parametrize("orientation", [1, 6])
def test_plain_jpegs_are_dalis_and_right(
    decoder: DaliDecoder, left_to_pil: list[int], name: str, orientation: int
) -> None:
    data = plain_jpegs()[name]
    if orientation != 1:
        exif = exif_of(orientation).tobytes()
        segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
        data = data[:2] + segment + data[2:]
    assert plain_jpeg_size(data) == (61, 45)
    view = View(40, 40, flip=True)
    (found,) = pixels_of(decoder.decode([DecodeJob(data, view, WHERE)]))
    assert (left_to_pil, decoder.rebuilds) == ([0], 0)
    mean, most, _ = difference(found, decode_one(data, view, WHERE))
    assert mean <= 0.4 and most <= 20


def test_a_walk_through_a_jpeg_sees_every_cut() -> None:
    for data in (encoded(noise(20, 20), "JPEG"), plain_jpegs()["progressive"]):
        size = plain_jpeg_size(data)
        assert size in ((20, 20), (61, 45))
        assert {plain_jpeg_size(data[:end]) for end in range(len(data))} == {None}
        assert plain_jpeg_size(data + b"\xff") == size


def others() -> dict[str, bytes]:
    """JPEGs that are not plain, or not whole, and a PNG."""
    data = encoded(noise(16, 16), "JPEG")
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    segment = data[frame : frame + 19]

    def changed(position: int, value: int) -> bytes:
        return data[:position] + bytes([value]) + data[position + 1 :]

    assert plain_jpeg_size(data) == (16, 16)
    return {
        "arithmetic coding": changed(frame + 1, 0xC9),
        "lossless": changed(frame + 1, 0xC3),
        "12 bits": changed(frame + 4, 12),
        "2 components": changed(frame + 9, 2),
        "no height": data[: frame + 5] + b"\0\0" + data[frame + 7 :],
        "two frames": data[:scan] + segment + data[scan:],
        "no frame": data[:frame] + data[frame + 19 :],
        "the frame behind the scan": data[:frame] + data[frame + 19 : -2] + segment + data[-2:],
        "no scan": data[:scan] + b"\xff\xd9",
        "junk between segments": data[:frame] + b"junk" + data[frame:],
        "a restart outside a scan": data[:frame] + b"\xff\xd0\0\2" + data[frame:],
        "a length of 1": data[: frame + 2] + b"\0\1" + data[frame + 4 :],
        "a picture in it": data[:scan] + data + data[scan:],
        "half": data[: len(data) // 2],
        "no end": data[:-2],
        "cmyk": encoded(Image.new("CMYK", (16, 16)), "JPEG"),
        "png": encoded(noise(16, 16)),
    }


@pytest.mark.parametrize("name", sorted(others()))
def test_dali_never_sees_what_is_not_a_plain_jpeg(
    decoder: DaliDecoder, left_to_pil: list[int], name: str
) -> None:
    data = others()[name]
    assert plain_jpeg_size(data) is None
    good = encoded(noise(16, 16), "JPEG")
    decoder.decode([DecodeJob(d, View(16, 16), WHERE) for d in (good, data, good)])
    assert (left_to_pil, decoder.rebuilds) == ([1], 0)


# --- batches and recovery -----------------------------------------------------------------------


def test_any_number_and_mixture_of_pictures_and_views(
    decoder: DaliDecoder, left_to_pil: list[int]
) -> None:
    views = [View(16, 16), View(24, 40, 0.0, True), View(64, 8, 1.0), View(90, 70)]
    for count in (1, 3, 4, 5, 11, 2):
        jobs = []
        for n in range(count):
            picture, kind = photo(50 + 9 * n, 80 - 3 * n, n), "PNG" if n % 5 == 3 else "JPEG"
            exif = exif_of(n % 8 + 1)
            jobs.append(DecodeJob(encoded(picture, kind, exif=exif), views[n % 4], str(n)))
        for found, job in zip(pixels_of(decoder.decode(jobs)), jobs, strict=True):
            assert found.shape == (job.view.height, job.view.width, 3)
            assert found.flags.c_contiguous and found.flags.writeable
            png = job.data.startswith(b"\x89PNG")
            reference = decode_one(job.data, job.view, "") if png else halved_first(job)
            assert difference(found, reference)[0] <= 0.5
        assert left_to_pil.pop() == sum(n % 5 == 3 for n in range(count))
    assert decoder.rebuilds == 0


def test_big_pictures_make_small_batches(
    decoder: DaliDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = DaliDecoder._run

    def spy(self: DaliDecoder, jobs: list[DecodeJob], batch: list[dali_module._Accepted]) -> object:
        sizes.append(len(batch))
        return run(self, jobs, batch)

    monkeypatch.setattr(DaliDecoder, "_run", spy)
    monkeypatch.setattr(dali_module, "_BATCH_PIXELS", 2000)
    sides = (10, 10, 40, 44, 50, 10, 10, 10, 10, 10)  # 2500 pixels are a batch of their own
    jobs = [DecodeJob(encoded(photo(s, s), "JPEG"), View(8, 8), "") for s in sides]
    assert len(pixels_of(decoder.decode(jobs))) == len(jobs)
    assert sizes == [3, 1, 1, 4, 1]


def bad_tables() -> bytes:
    """A JPEG of whole structure that no decoder takes: more codes than there can be."""
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16
    return bytes(data)


def test_where_dali_fails_pil_decodes_and_dali_goes_on(
    decoder: DaliDecoder, left_to_pil: list[int]
) -> None:
    good = [DecodeJob(encoded(photo(30, 40, n), "JPEG"), View(16, 16), str(n)) for n in range(6)]
    expected = pixels_of(decoder.decode(good))
    assert (left_to_pil.pop(), decoder.rebuilds) == (0, 0)
    assert plain_jpeg_size(bad_tables()) == (16, 16)  # else the case is no longer one
    for times in (1, 2):
        bad = DecodeJob(bad_tables(), View(16, 16), WHERE)
        results = decoder.decode([*good[:2], bad, *good[2:]])
        failed = results.pop(2)
        assert isinstance(failed, BadSampleError) and failed.kind == pil.DAMAGED
        # A batch of 4 went to PIL, the other 3 stayed with DALI.
        assert (left_to_pil.pop(), decoder.rebuilds) == (4, times)
        for a, b in zip(pixels_of(results), expected, strict=True):
            assert difference(a, b)[0] <= 0.4
        assert all(map(np.array_equal, pixels_of(decoder.decode(good)), expected))
        assert (left_to_pil.pop(), decoder.rebuilds) == (0, times)


# --- what is decoded and how it is resized ------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_picture_that_has_the_size_keeps_its_pixels(
    decoder: DaliDecoder, subsampling: int
) -> None:
    """Cut out of the middle, at odd places too, without any filter."""
    whole = encoded(photo(61, 97, 3), "JPEG", subsampling=subsampling, quality=90)
    (full,) = pixels_of(decoder.decode([DecodeJob(whole, View(61, 97), WHERE)]))
    jobs = [DecodeJob(whole, View(61, 61, place), WHERE) for place in (0.0, 0.3, 0.55, 1.0)]
    for job, found in zip(jobs, pixels_of(decoder.decode(jobs)), strict=True):
        left = int(job.view.place * 36)
        assert np.array_equal(found, full[:, left : left + 61])


@pytest.mark.parametrize("name", ["lanczos", "triangular"])
def test_what_is_not_decoded_changes_nothing(name: Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow box in a wide picture, enlarged, reduced and halved, at even and odd places."""
    decoder = DaliDecoder(1, 8, filter=name)
    data = encoded(photo(120, 400, 5), "JPEG", subsampling=2, quality=90)
    views = [View(side, side, place) for side in (40, 90, 150) for place in (0.31, 0.5, 1.0)]
    jobs = [DecodeJob(data, view, WHERE) for view in views]
    found = pixels_of(decoder.decode(jobs))
    monkeypatch.setattr(dali_module, "_REACH", 400)
    for a, b in zip(found, pixels_of(decoder.decode(jobs)), strict=True):
        mean, most, _ = difference(a, b)
        assert mean <= 0.03 and most <= 1  # places are rounded to fp32
    parts = [dali_module._accept(n, job, name) for n, job in enumerate(jobs)]
    assert all(part is not None and part.part == (0, 0, 400, 120) for part in parts)


# --- agreement with PIL -------------------------------------------------------------------------


def pictures() -> Iterator[list[DecodeJob]]:
    """Shades, edges, lines and noise in several sizes, crops, flips and all orientations."""
    sizes = ((96, 128), (301, 203), (520, 640))
    views = (View(64, 64), View(96, 64, 0.0, True), View(128, 192, 1.0), View(256, 256, 0.3))
    for (n, size), subsampling in itertools.product(enumerate(sizes), (0, 2)):
        yield [
            DecodeJob(
                encoded(
                    photo(*size, n),
                    "JPEG",
                    quality=90,
                    subsampling=subsampling,
                    exif=exif_of((4 * n + k + subsampling) % 8 + 1),
                ),
                view,
                WHERE,
            )
            for k, view in enumerate(views)
        ]


# (mean over all, largest mean and maximum of a picture, least PSNR); docs/data.md has the numbers.
BOUNDS = {
    "PIL, scaled decoding": (0.95, 2.9, 51, 34),
    "lanczos": (0.72, 2.55, 42, 34),
    "lanczos against PIL that halves": (0.24, 0.41, 24, 48),
    "triangular": (1.95, 4.3, 53, 32),
}


def test_pixels_agree_within_the_stated_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each against PIL without scaled decoding; DALI's Lanczos also against PIL that halves too."""
    filters: tuple[Filter, ...] = ("lanczos", "triangular")
    decoders = {name: DaliDecoder(1, 4, filter=name) for name in filters}
    found: dict[str, list[tuple[float, int, float]]] = {name: [] for name in BOUNDS}
    for jobs in pictures():
        results = {name: decoder.decode(jobs) for name, decoder in decoders.items()}
        results["PIL, scaled decoding"] = PilDecoder().decode(jobs)
        with monkeypatch.context() as patch:
            patch.setattr(pil, "_draft", lambda *_: 1)
            reference = pixels_of(PilDecoder().decode(jobs))
        for name, result in results.items():
            pairs = zip(pixels_of(result), reference, strict=True)
            found[name] += [difference(a, b) for a, b in pairs]
        pairs = zip(pixels_of(results["lanczos"]), map(halved_first, jobs), strict=True)
        found["lanczos against PIL that halves"] += [difference(a, b) for a, b in pairs]
    for name, (overall, worst, most, psnr) in BOUNDS.items():
        means, maxima, psnrs = zip(*found[name], strict=True)
        measured = (np.mean(means), max(means), max(maxima), min(psnrs))
        print(name, measured)
        assert measured[0] <= overall and measured[1] <= worst, (name, measured)
        assert measured[2] <= most and measured[3] >= psnr, (name, measured)
    assert all(decoder.rebuilds == 0 for decoder in decoders.values())
