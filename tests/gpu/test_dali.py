"""DALI on a GPU: what it decodes there is what its CPU pipeline decodes, and stays there."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="pydantic is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from soar_mega.data.decode.dali import DaliDecoder
from soar_mega.data.decode.handover import stack_pixels
from soar_mega.data.decode.interface import DecodeJob, Pixels, View
from soar_mega.data.decode.pil import decode_one
from soar_mega.data.errors import BadSampleError
from tests.unit.decode_cases import encoded, exif_of, photo
from tests.unit.test_data_decode_dali import bad_tables, difference, pictures

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
MEAN = 0.22  # levels of 255, over all pictures: as docs/data.md says of the CPU pipeline


@pytest.fixture
def decoder() -> Iterator[DaliDecoder]:
    made = DaliDecoder(2, 4, device_id=0)
    yield made
    made.close()


def on_host(result: Pixels | BadSampleError) -> np.ndarray:
    assert isinstance(result, torch.Tensor), result
    assert result.device == DEVICE and result.dtype == torch.uint8 and result.is_contiguous()
    return result.cpu().numpy()


def test_pictures_are_the_cpu_pipelines(decoder: DaliDecoder) -> None:
    """All orientations, crops and flips, enlarged, reduced and halved; 4:4:4 and 4:2:0."""
    cpu, found = DaliDecoder(1, 4), []
    for jobs in pictures():
        pairs = zip(decoder.decode(jobs), cpu.decode(jobs), strict=True)
        found += [difference(on_host(a), np.asarray(b)) for a, b in pairs]
    means, maxima, _ = zip(*found, strict=True)
    print(f"mean {np.mean(means):.3f}, worst mean {max(means):.3f}, maximum {max(maxima)}")
    assert np.mean(means) <= MEAN and max(maxima) <= 24
    assert decoder.rebuilds == cpu.rebuilds == 0


def jobs_of(count: int) -> list[DecodeJob]:
    views = [View(32, 32), View(24, 40, 0.0, True), View(64, 48, 1.0)]
    return [
        DecodeJob(
            encoded(photo(90 + 9 * n, 140 - 3 * n, n), "JPEG", exif=exif_of(n % 8 + 1)),
            views[n % 3],
            str(n),
        )
        for n in range(count)
    ]


def test_a_pictures_bits_do_not_depend_on_its_neighbours(decoder: DaliDecoder) -> None:
    jobs = jobs_of(11)
    together = [on_host(one) for one in decoder.decode(jobs)]
    alone = [on_host(decoder.decode([job])[0]) for job in jobs]
    backwards = [on_host(one) for one in decoder.decode(jobs[::-1])][::-1]
    assert all(map(np.array_equal, together, alone))
    assert all(map(np.array_equal, together, backwards))


def test_what_dali_may_not_see_is_pils(decoder: DaliDecoder) -> None:
    good = jobs_of(4)
    view = View(32, 32)
    png = DecodeJob(encoded(photo(40, 50)), view, "png")
    webp = DecodeJob(encoded(photo(40, 50), "WEBP", lossless=True), view, "webp")
    cut = DecodeJob(good[0].data[: len(good[0].data) // 2], view, "cut")
    results = decoder.decode([png, good[0], cut, webp, *good[1:]])
    for place, job in ((0, png), (3, webp)):
        found = results[place]
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, decode_one(job.data, job.view, ""))
    assert isinstance(results[2], BadSampleError) and decoder.rebuilds == 0
    batch = stack_pixels([results[0], on_host(results[1]), results[3]], DEVICE)  # type: ignore[list-item]
    assert batch.device == DEVICE and batch.shape == (3, 32, 32, 3)


def test_damage_that_only_decoding_finds_costs_one_picture(decoder: DaliDecoder) -> None:
    good = jobs_of(4)
    expected = [on_host(one) for one in decoder.decode(good)]
    bad = DecodeJob(bad_tables(), View(16, 16), "bad")
    results = decoder.decode([good[0], bad, *good[1:]])
    failed = results.pop(1)
    # nvJPEG may take these tables, as no other decoder does; then there is a picture of some kind.
    assert isinstance(failed, BadSampleError) or tuple(failed.shape) == (16, 16, 3)
    assert not any(isinstance(one, BadSampleError) for one in results)
    assert all(map(np.array_equal, [on_host(one) for one in decoder.decode(good)], expected))


def test_pictures_outlive_dalis_buffers_while_the_device_is_busy(decoder: DaliDecoder) -> None:
    """A thread decodes ahead, as in training; this one stacks on a stream with work queued on it.

    Wrong stream order, or memory given away too early, shows as pixels of another picture.
    """
    jobs = [DecodeJob(encoded(photo(96, 96, n), "JPEG"), View(64, 64), str(n)) for n in range(24)]
    expected = [on_host(one) for one in decoder.decode(jobs)]
    ready: list[list[Pixels]] = []
    there = threading.Semaphore(0)

    def ahead() -> None:
        for _ in range(8):
            found = decoder.decode(jobs)
            ready.append([one for one in found if not isinstance(one, BadSampleError)])
            there.release()

    thread = threading.Thread(target=ahead)
    thread.start()
    work = torch.randn(4096, 4096, device=DEVICE)
    stacked = []
    for _ in range(8):
        assert there.acquire(timeout=60)
        for _ in range(8):
            work = (work @ work).clamp(-1, 1)
        stacked.append(stack_pixels(ready.pop(0), DEVICE))
    thread.join()
    for batch in stacked:
        assert np.array_equal(batch.cpu().numpy(), np.stack(expected))
