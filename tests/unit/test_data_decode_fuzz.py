"""Random damage: every decoder gives pixels of the right shape or a BadSampleError."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from soar_mega.data.decode import pil
from soar_mega.data.decode.dali import DaliDecoder
from soar_mega.data.decode.interface import DecodeJob, View
from soar_mega.data.decode.make import make_decoder
from soar_mega.data.errors import BadSampleError
from tests.unit.decode_cases import encoded, exif_of, noise, photo

VIEW = View(12, 20, 0.3, True)
LONGEST_S = 20  # of one batch of small pictures: anything near it hangs


def seeds() -> list[bytes]:
    pixels_HWC = photo(24, 33)
    image = Image.fromarray(pixels_HWC)
    second = {"save_all": True, "append_images": [Image.new("RGB", (33, 24))]}
    alpha = np.concatenate([pixels_HWC, noise(24, 33, 1)], axis=-1)
    return [
        encoded(image, "JPEG", exif=exif_of(6)),
        encoded(image, "JPEG", progressive=True),
        encoded(image, "JPEG", restart_marker_blocks=1),
        encoded(image.convert("L"), "JPEG"),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, exif=exif_of(5)),
        encoded(alpha),
        encoded(image.convert("P"), transparency=3),
        encoded(image, **second),
        encoded(image, "WEBP", exif=exif_of(8)),
        encoded(alpha, "WEBP", lossless=True),
        encoded(image, "WEBP", **second),
    ]


def mutated(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """One or two changes: bytes, cuts, repeats, gaps, another file's bytes; often near the head,
    where the structure is."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 3)):
        end = len(changed) if random.random() < 0.5 else min(len(changed), 200)
        at = int(random.integers(0, max(end, 1)))
        length = int(random.integers(1, 40))
        match random.integers(0, 7):
            case 0 | 1:
                changed[at : at + 1] = bytes([random.integers(0, 256)])
            case 2:
                changed[at : at + 2] = random.choice(
                    [b"\xff\xff", b"\0\0", b"\xff\xd9", b"\x7f\xff"]
                )
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length]
            case 6:
                changed[at : at + length] = other[at : at + length]
    return bytes(changed)


def run(name: str, cases: int, seed: int) -> Counter[str]:
    """Kinds of results; each batch has a whole picture, which must come out whole."""
    random = np.random.default_rng(seed)
    whole = encoded(np.full((24, 33, 3), (200, 90, 30), np.uint8), "JPEG", quality=95)
    decoder = make_decoder(name, 1, batch_size=4)  # type: ignore[arg-type]
    files, kinds = seeds(), Counter[str]()
    for _ in range(-(-cases // 3)):
        some = [files[random.integers(len(files))] for _ in range(6)]
        bad = [mutated(a, b, random) for a, b in zip(some[:3], some[3:], strict=True)]
        jobs = [DecodeJob(data, VIEW, "w") for data in (bad[0], whole, *bad[1:])]
        start = time.monotonic()
        results = decoder.decode(jobs)
        assert time.monotonic() - start < LONGEST_S
        for result in results:
            if isinstance(result, np.ndarray):
                assert result.shape == (VIEW.height, VIEW.width, 3) and result.dtype == np.uint8
            else:
                assert isinstance(result, BadSampleError) and str(result).startswith("w: ")
                assert result.kind in (pil.NOT_AN_IMAGE, pil.DAMAGED, pil.TOO_MANY_PIXELS)
            kinds[getattr(result, "kind", "pixels")] += 1
        assert isinstance(results[1], np.ndarray)
        assert np.abs(results[1].astype(int) - (200, 90, 30)).max() <= 3
    kinds["rebuilds"] = decoder.rebuilds if isinstance(decoder, DaliDecoder) else 0
    decoder.close()
    return kinds


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["pil", "dali"])
def test_damaged_files(name: str) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    kinds = run(name, 1_200, seed=1)
    # The damage is of every sort: much of it shows, some does not.
    assert kinds["pixels"] > 400 + 100 and kinds[pil.DAMAGED] > 300
    assert kinds[pil.NOT_AN_IMAGE] > 5 and kinds[pil.TOO_MANY_PIXELS] > 0
    assert (kinds["rebuilds"] > 0) == (name == "dali")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["pil", "dali"])
def test_many_damaged_files(name: str) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    assert run(name, 5_001, seed=2).total() >= 5_001
