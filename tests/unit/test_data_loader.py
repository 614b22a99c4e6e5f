"""The loader: what a step holds depends on (seed, step) only, whoever loads it and however.

The encoders here are cheap stand-ins that count their work and whose results name the sample and
the caption; ``test_data_encoders`` runs the loader on the real classes.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.errors import DataError
from soar_mega.data.loader import StepLoader
from soar_mega.data.sampler import Sampler
from soar_mega.data.shards.index import ShardIndex, build_index
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import MicroBatch, TextCondition
from tests.distributed.harness import run_ranks
from tests.unit.test_data_index import picture, write_shards, write_tar


class CountingEncoders(FrozenEncoders):
    """Mean: averages of 8 x 8 pixels; log-variance: constant; text: the caption's bytes."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.latent_channels, self.downsampling = 3, 8
        self.shift_factor, self.scaling_factor = 0.25, 2.0
        self.images = 0
        self.prompts: list[str] = []

    def encode_images(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        self.images += len(pixels_B3HW)
        mean = torch.nn.functional.avg_pool2d(pixels_B3HW, 8)
        return mean, torch.full_like(mean, -4.0)

    def encode_prompts(self, prompts: Any, max_sequence_length: int) -> TextCondition:
        self.prompts += prompts
        codes = [list(p.encode()[:12].ljust(12)) for p in prompts]
        text_BTE = torch.tensor(codes, dtype=torch.bfloat16).view(len(prompts), 4, 3)
        return TextCondition(text_BTE, text_BTE[:, 0])


def mesh_of(data_rank: int, data_size: int) -> Mesh:
    device = torch.device("cpu")
    return Mesh(data_rank, data_size, 0, 1, data_rank, data_size, None, None, None, device)


def make(
    index: ShardIndex,
    mesh: Mesh | None = None,
    *,
    encoders: CountingEncoders | None = None,
    batch: int = 12,
    micro: int = 2,
    seed: int = 5,
    **options: Any,
) -> StepLoader:
    return StepLoader(
        index,
        Sampler(len(index), seed),
        encoders or CountingEncoders(),
        mesh or Mesh.single(),
        seed=seed,
        global_batch_size=batch,
        micro_batch_size=micro,
        resolution=16,
        max_sequence_length=4,
        **options,
    )


def tensors(micros: list[MicroBatch]) -> dict[str, Tensor]:
    """The microbatches of a step as whole tensors."""
    return {
        "slots": torch.cat([m.slots_B for m in micros]),
        "clean": torch.cat([m.clean_BCHW for m in micros]),
        "text": torch.cat([m.prompt.text_BTE for m in micros]),
        "pooled": torch.cat([m.prompt.pooled_BV for m in micros]),
        "weight": torch.cat([m.weight_B for m in micros]),
        "empty": micros[0].empty.text_BTE,
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return build_index(str(write_shards(tmp_path, [9, 0, 8], captions=6) / "*.tar"))


STEPS = 4


def reference(index: ShardIndex, **options: Any) -> list[dict[str, Tensor]]:
    loader = make(index, num_decode_threads=0, **options)
    return [tensors(loader.load(step)) for step in range(STEPS)]


def test_slots_hold_the_samplers_samples(index: ShardIndex) -> None:
    loader, sampler = make(index), Sampler(len(index), 5)
    for step in range(STEPS):
        micros = loader.load(step)
        assert [m.step for m in micros] == [step] * 6
        assert all(len(m.slots_B) == 2 for m in micros)
        step_tensors = tensors(micros)
        assert step_tensors["slots"].tolist() == list(range(12))
        for slot, (_, sample) in enumerate(sampler.samples_of_step(step, 12)):
            code = f"caption {sample % 6}".encode().ljust(12)
            assert bytes(step_tensors["text"][slot].flatten().int().tolist()) == code
            colour = [sample * factor % 256 / 127.5 - 1 for factor in (37, 91, 53)]
            expected = (torch.tensor(colour) - 0.25) * 2.0
            found = step_tensors["clean"][slot].mean((1, 2))
            torch.testing.assert_close(found, expected, atol=1.0, rtol=0)  # noise: 2 * exp(-2)
    loader.close()


def test_posterior_noise_is_fresh_for_each_step_and_slot(index: ShardIndex) -> None:
    """The same sample met again has the same mean and other noise of the right size."""
    loader = make(index, batch=len(index), micro=len(index), cache_encoded=True)
    sampler = Sampler(len(index), 5)
    residuals = []
    for step in range(2):
        clean = tensors(loader.load(step))["clean"]
        for slot, (_, sample) in enumerate(sampler.samples_of_step(step, len(index))):
            colour = [sample * factor % 256 / 127.5 - 1 for factor in (37, 91, 53)]
            mean = (torch.tensor(colour) - 0.25) * 2.0
            residuals.append(clean[slot] - mean[:, None, None])
    loader.close()
    noise = torch.stack(residuals).flatten(1) / (2.0 * torch.exp(torch.tensor(-2.0)))
    assert abs(float(noise.std()) - 1) < 0.1 and abs(float(noise.mean())) < 0.15
    alike = torch.corrcoef(noise).fill_diagonal_(0)
    assert float(alike.max()) < 0.99  # no two draws are the same


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_workers_and_cache_change_nothing(
    index: ShardIndex, threads: int, cache: bool, flip: bool
) -> None:
    expected = reference(index, random_flip=flip)
    loader = make(index, cache_encoded=cache, random_flip=flip, num_decode_threads=threads)
    for step in (0, 1, 2, 3, 1, 3, 0):  # also jumps, forwards and back
        assert_same(tensors(loader.load(step)), expected[step])
    loader.close()


@pytest.mark.parametrize("size", [2, 3, 6])
def test_data_ranks_partition_the_batch(index: ShardIndex, size: int) -> None:
    expected = reference(index)
    loaders = [make(index, mesh_of(rank, size), micro=1) for rank in range(size)]
    for step in range(STEPS):
        parts = [tensors(loader.load(step)) for loader in loaders]
        for name in ("slots", "clean", "text", "pooled", "weight"):
            assert torch.equal(torch.cat([part[name] for part in parts]), expected[step][name])
    for loader in loaders:
        loader.close()


def test_batch_larger_than_the_set(index: ShardIndex) -> None:
    loader = make(index, batch=40, micro=8)
    found = tensors(loader.load(1))
    loader.close()
    again = make(index, batch=40, micro=8, cache_encoded=True, num_decode_threads=0)
    assert_same(tensors(again.load(1)), found)


def test_cache_encodes_each_picture_and_caption_once(index: ShardIndex) -> None:
    encoders = CountingEncoders()
    loader = make(index, encoders=encoders, cache_encoded=True)
    for step in range(5):
        loader.load(step)
    loader.close()
    assert encoders.images == len(index)
    assert sorted(encoders.prompts) == ["", *(f"caption {n}" for n in range(6))]


def test_flip_mirrors_about_half_of_the_slots(tmp_path: Path) -> None:
    from PIL import Image

    half = Image.new("RGB", (16, 16), "black")
    half.paste("white", (8, 0, 16, 16))
    half.save(tmp_path / "a.png")
    members = [("a.png", (tmp_path / "a.png").read_bytes()), ("a.txt", b"x")]
    index = build_index(str(write_tar(tmp_path / "a.tar", members)))
    encoders = CountingEncoders()
    loader = make(
        index, encoders=encoders, batch=200, micro=200, random_flip=True, cache_encoded=True
    )
    clean = tensors(loader.load(0))["clean"]
    mirrored = clean[:, 0, 0, 0] > clean[:, 0, 0, 1]
    assert 70 < int(mirrored.sum()) < 130
    assert encoders.images == 2  # one sample in two orientations
    loader.load(1)
    assert encoders.images == 2
    loader.close()


def test_next_step_is_read_in_the_background(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    read_image = ShardIndex.read_image

    def spy(self: ShardIndex, sample: int) -> bytes:
        readers.append(threading.current_thread().name)
        return read_image(self, sample)

    monkeypatch.setattr(ShardIndex, "read_image", spy)
    loader = make(index, num_decode_threads=2)
    sampler = Sampler(len(index), 5)
    # Step 1 crosses an epoch border; a sample that comes twice is read once.
    first, second = ({s for _, s in sampler.samples_of_step(step, 12)} for step in (0, 1))
    loader.load(0)
    deadline = time.monotonic() + 10
    while len(readers) < len(first) + len(second) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(readers) == len(first) + len(second)
    assert threading.current_thread().name not in readers
    loader.load(1)
    loader.close()
    assert len(readers) <= len(first) + len(second) + 12  # and those of step 2, not step 1 again


def test_a_bad_picture_surfaces_in_its_own_step(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for number in range(24):
        data = b"not a picture" if number == 17 else picture(number)
        members += [(f"k{number}.png", data), (f"k{number}.txt", b"x")]
    index = build_index(str(write_tar(tmp_path / "a.tar", members)))
    sampler = Sampler(24, 5)
    bad = next(
        step for step in (0, 1) if 17 in [sample for _, sample in sampler.samples_of_step(step, 12)]
    )
    loader = make(index)
    for step in (0, 1, 0, 1):
        if step == bad:
            with pytest.raises(DataError, match=r"a\.tar, key 'k17': not a complete"):
                loader.load(step)
        else:
            assert len(loader.load(step)) == 6
    loader.close()


def test_wrong_sizes_are_named(index: ShardIndex) -> None:
    words = r"train\.global_batch_size=12: must be a multiple of train\.micro_batch_size 5"
    with pytest.raises(ValueError, match=words):
        make(index, micro=5)
    with pytest.raises(ValueError, match=r"2 data-parallel ranks \(16\)"):
        make(index, mesh_of(0, 2), micro=8)


def test_cached_load_is_fast(tmp_path: Path) -> None:
    """Without the generator (measured apart) a cached load is table work: well under 20 ms even on
    a busy machine; it is about 1."""
    index = build_index(str(write_shards(tmp_path, [128]) / "*.tar"))
    loader = make(index, batch=64, micro=8, cache_encoded=True)
    for step in range(3):
        loader.load(step)
    times = []
    for step in range(3, 23):
        start = time.perf_counter()
        loader.load(step)
        times.append(time.perf_counter() - start)
    loader.close()
    assert sorted(times)[5] < 0.02


def tensor_ranks(folder: str) -> dict[str, Any]:
    """On each process: load some steps; then a step with a bad picture in one peer's share."""
    mesh = Mesh.build(2)
    index = build_index(f"{folder}/good/*.tar")
    result: dict[str, Any] = {}
    for cache in (False, True):
        encoders = CountingEncoders()
        loader = make(
            index, mesh, encoders=encoders, micro=3, cache_encoded=cache, random_flip=True
        )
        steps = [tensors(loader.load(step)) for step in (0, 1, 3, 2)]
        loader.close()
        result[f"cache={cache}"] = {"steps": steps, "images": encoders.images}
    bad = make(build_index(f"{folder}/bad.tar"), mesh, batch=4)
    try:
        bad.load(0)
    except DataError as error:
        result["error"] = str(error)
    bad.close()
    dist.barrier()
    return result


def test_tensor_peers_share_the_work_and_hold_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    write_shards(tmp_path / "good", [9, 8], captions=6)
    members = [(f"k{n}.{e}", d) for n in range(4) for e, d in (("png", picture(n)), ("txt", b"x"))]
    first = Sampler(4, 5).samples_of_step(0, 4)[0][1]
    members[2 * first] = (f"k{first}.png", b"bad")
    write_tar(tmp_path / "bad.tar", members)
    index = build_index(str(tmp_path / "good" / "*.tar"))
    expected = reference(index, random_flip=True)

    results = run_ranks(2, tensor_ranks, str(tmp_path))
    for cache in (False, True):
        runs = [result[f"cache={cache}"] for result in results]
        for run in runs:
            for found, step in zip(run["steps"], (0, 1, 3, 2), strict=True):
                assert_same(found, expected[step])
        alone = CountingEncoders()
        loader = make(index, encoders=alone, random_flip=True, cache_encoded=cache)
        for step in (0, 1, 3, 2):
            loader.load(step)
        loader.close()
        done = [run["images"] for run in runs]
        assert sum(done) == alone.images and max(done) - min(done) <= 4
    assert f"key 'k{first}': not a complete" in results[0]["error"]
    assert "model-parallel rank 0 of data-parallel rank 0 could not read" in results[1]["error"]
