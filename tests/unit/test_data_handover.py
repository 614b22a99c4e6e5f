"""Pixels that stay where they were decoded: tensors must give what arrays give. Without a GPU the
same steps are taken on the host's memory; tests/gpu/test_dali.py takes them on a device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soar_mega.data.decode import make as decoder_maker
from soar_mega.data.decode.dali import DaliDecoder
from soar_mega.data.decode.geometry import Placement
from soar_mega.data.decode.handover import stack_pixels, upright
from soar_mega.data.decode.interface import DecodeJob, View
from soar_mega.data.errors import BadSampleError
from soar_mega.data.shards.index import build_index
from tests.unit import test_data_loader as loaders
from tests.unit.decode_cases import encoded, exif_of, photo
from tests.unit.test_data_index import write_tar


@pytest.mark.parametrize("turn", list(itertools.product((False, True), repeat=3)))
def test_tensors_turn_as_arrays_do(turn: tuple[bool, bool, bool]) -> None:
    pixels_HWC = photo(5, 7)
    placement = Placement((0, 0, 7, 5), 5, 7, turn)
    expected = placement.finish(pixels_HWC)
    source = torch.from_numpy(pixels_HWC)
    found = upright(source, placement)
    assert np.array_equal(found.numpy(), expected) and found.is_contiguous()
    assert found.data_ptr() != source.data_ptr()  # DALI takes its own memory back


def test_arrays_and_tensors_stack_alike() -> None:
    pictures = [photo(6, 8, n) for n in range(4)]
    mixed = [p if n % 2 else torch.from_numpy(p) for n, p in enumerate(pictures)]
    device = torch.device("cpu")
    expected = torch.from_numpy(np.stack(pictures))
    for some in (pictures, mixed, [torch.from_numpy(p) for p in pictures]):
        found = stack_pixels(some, device)
        assert torch.equal(found, expected) and found.dtype == torch.uint8


class HostHandover:
    """``GpuHandover`` for a pipeline on the CPU."""

    def take(self, output: Any, placements: Sequence[Placement]) -> list[Tensor]:
        views = [torch.from_dlpack(output[row]) for row in range(len(placements))]
        return [upright(view, one) for view, one in zip(views, placements, strict=True)]


def dali(handover: bool, threads: int = 1) -> DaliDecoder:
    pytest.importorskip("nvidia.dali")
    decoder = DaliDecoder(threads, 4)
    if handover:
        decoder._handover = HostHandover()  # type: ignore[assignment]
    return decoder


def test_handed_over_pictures_outlive_their_batch_and_are_the_same() -> None:
    views = [View(16, 16), View(24, 40, 0.0, True), View(64, 8, 1.0)]
    jobs = [
        DecodeJob(
            encoded(photo(50 + n, 80 - n, n), "JPEG", exif=exif_of(n % 8 + 1)), views[n % 3], ""
        )
        for n in range(11)
    ]
    jobs.insert(3, DecodeJob(encoded(photo(30, 40)), views[0], "a PNG is PIL's"))
    jobs.insert(7, DecodeJob(jobs[0].data[:200], views[0], "cut"))
    plain, given = dali(False).decode(jobs), dali(True).decode(jobs)
    assert isinstance(given[3], np.ndarray) and isinstance(given[7], BadSampleError)
    for n, (a, b) in enumerate(zip(plain, given, strict=True)):
        if isinstance(a, np.ndarray) and n != 3:
            assert isinstance(b, Tensor) and np.array_equal(a, b.numpy())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_of_tensors_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """JPEGs as tensors and PNGs as arrays, in one batch, cropped and flipped."""
    for shard in range(2):
        members = []
        for n in range(9):
            kind, name = ("PNG", "png") if n % 4 == 3 else ("JPEG", "jpg")
            picture = encoded(photo(20 + n, 33 - n, 9 * shard + n), kind)
            members += [(f"{n}.{name}", picture), (f"{n}.txt", f"caption {n}".encode())]
        write_tar(tmp_path / f"{shard}.tar", members)
    index = build_index(str(tmp_path / "*.tar"))

    def steps(handover: bool) -> list[dict[str, Tensor]]:
        monkeypatch.setattr(loaders, "make_decoder", lambda *_: dali(handover, num_workers))
        loader = loaders.make(index, num_workers=num_workers, random_crop=True, random_flip=True)
        return [loaders.tensors(loader.load(step)) for step in range(3)]

    for a, b in zip(steps(False), steps(True), strict=True):
        loaders.assert_same(a, b)


# --- the pipeline that a GPU would run ----------------------------------------------------------


def places(decoder: DaliDecoder) -> dict[str, str]:
    """Where each operator's result lies, by the operator's name."""
    (output,) = decoder._graph()._graph_out
    found: dict[str, str] = {}

    def walk(node: Any) -> None:
        found[node.name.strip("_")] = node.device
        for inputs in node.source.inputs:
            for one in inputs if isinstance(inputs, list | tuple) else [inputs]:
                walk(one)

    walk(output)
    return found


def test_on_a_gpu_pictures_are_decoded_and_resized_there() -> None:
    decoder = dali(False)
    on_host = places(decoder)
    decoder._device_id = 0
    on_gpu = places(decoder)
    assert set(on_host.values()) == {"cpu"}
    for name, device in on_gpu.items():
        pixels = any(word in name for word in ("ImageSlice", "Resize", "Merge", "Split"))
        if name.startswith(("ImageSlice", "Resize", "Merge")):
            assert device == "gpu", name
        elif not pixels:
            assert device == "cpu", name  # what is told about the pictures
    assert any(name.startswith("ImageSlice") for name in on_gpu)
    assert sum(name.startswith("Resize") for name in on_gpu) == 2


def test_the_device_reaches_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(decoder_maker, "DaliDecoder", lambda *args: asked.append(args))
    decoder_maker.make_decoder("dali", 3, device_id=torch.device("cuda", 1).index)
    decoder_maker.make_decoder("dali", 3, device_id=torch.device("cpu").index)
    assert asked == [(3, 32, 1, "lanczos"), (3, 32, None, "lanczos")]
