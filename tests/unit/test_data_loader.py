"""The loader: what a step holds depends on (seed, step) only, whoever loads it and however.

The encoders here are cheap stand-ins that count their work and whose results name the sample and
the caption; ``test_data_encoders`` runs the loader on the real classes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.data.buckets import Bucket, bucket_of
from soar_mega.data.decode.make import make_decoder
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.errors import BAD_KINDS, BadSampleError, DataError
from soar_mega.data.loader import Batch, StepLoader
from soar_mega.data.online import OnlineRows
from soar_mega.data.order import Order, OrderedSource, OrderState
from soar_mega.data.plan import Picture, Planner, StepPlan
from soar_mega.data.shards.index import ShardIndex, build_index
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import TextCondition
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


def order_of(index: ShardIndex, seed: int = 5) -> Order:
    return Order([OrderedSource(index.counts)], seed)


def samples_of_step(index: ShardIndex, step: int, batch: int) -> list[int]:
    """The samples in slot order."""
    order = order_of(index)
    return [draw.sample for draw in order.take(order.start, (step + 1) * batch)[0][step * batch :]]


def make(
    index: ShardIndex,
    mesh: Mesh | None = None,
    *,
    encoders: CountingEncoders | None = None,
    decoder: str = "pil",
    batch: int = 12,
    micro: int = 2,
    seed: int = 5,
    order: Order | None = None,
    buckets: tuple[Bucket, ...] = (Bucket(16, 16),),
    cache: bool = False,
    num_workers: int = 2,
    prefetch_steps: int = 1,
    on_bad: Any = lambda *_: None,
    **plan: Any,
) -> StepLoader:
    mesh, encoders = mesh or Mesh.single(), encoders or CountingEncoders()
    planner = Planner(
        order or order_of(index, seed), buckets, mesh, seed=seed, global_batch_size=batch, **plan
    )
    rows = OnlineRows(
        index,
        encoders,
        mesh,
        make_decoder(decoder, num_workers),  # type: ignore[arg-type]
        micro_batch_size=micro,
        max_sequence_length=4,
        cache=cache,
        num_workers=num_workers,
        on_bad=on_bad,
    )
    return StepLoader(
        planner,
        rows,
        encoders,
        mesh,
        seed=seed,
        micro_batch_size=micro,
        prefetch_steps=prefetch_steps,
    )


def tensors(batch: Batch) -> dict[str, Tensor]:
    """The microbatches of a step as whole tensors."""
    micros = batch.microbatches
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
    loader = make(index, num_workers=0, **options)
    return [tensors(loader.load(step)) for step in range(STEPS)]


def test_slots_hold_the_samplers_samples(index: ShardIndex) -> None:
    loader = make(index)
    for step in range(STEPS):
        batch = loader.load(step)
        assert [m.step for m in batch.microbatches] == [step] * 6
        assert all(len(m.slots_B) == 2 for m in batch.microbatches)
        step_tensors = tensors(batch)
        assert step_tensors["slots"].tolist() == list(range(12))
        for slot, sample in enumerate(samples_of_step(index, step, 12)):
            code = f"caption {sample % 6}".encode().ljust(12)
            assert bytes(step_tensors["text"][slot].flatten().int().tolist()) == code
            colour = [sample * factor % 256 / 127.5 - 1 for factor in (37, 91, 53)]
            expected = (torch.tensor(colour) - 0.25) * 2.0
            found = step_tensors["clean"][slot].mean((1, 2))
            torch.testing.assert_close(found, expected, atol=1.0, rtol=0)  # noise: 2 * exp(-2)
    loader.close()


def test_posterior_noise_is_fresh_for_each_step_and_slot(index: ShardIndex) -> None:
    """The same sample met again has the same mean and other noise of the right size."""
    loader = make(index, batch=len(index), micro=len(index), cache=True)
    residuals = []
    for step in range(2):
        clean = tensors(loader.load(step))["clean"]
        for slot, sample in enumerate(samples_of_step(index, step, len(index))):
            colour = [sample * factor % 256 / 127.5 - 1 for factor in (37, 91, 53)]
            mean = (torch.tensor(colour) - 0.25) * 2.0
            residuals.append(clean[slot] - mean[:, None, None])
    loader.close()
    noise = torch.stack(residuals).flatten(1) / (2.0 * torch.exp(torch.tensor(-2.0)))
    assert abs(float(noise.std()) - 1) < 0.1 and abs(float(noise.mean())) < 0.15
    alike = torch.corrcoef(noise).fill_diagonal_(0)
    assert float(alike.max()) < 0.99  # no two draws are the same


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("vary", [False, True])
def test_workers_and_cache_change_nothing(
    index: ShardIndex, workers: int, cache: bool, vary: bool
) -> None:
    options = {"random_flip": vary, "random_crop": vary}
    expected = reference(index, **options)
    ahead = {"prefetch_steps": 3} if workers == 4 else {}
    loader = make(index, cache=cache, num_workers=workers, **ahead, **options)
    states = []
    for step in range(STEPS):
        batch = loader.load(step)
        states.append(batch.plan.after)
        assert_same(tensors(batch), expected[step])
    loader.close()
    # From any step on, with nothing but the position.
    for first in range(1, STEPS):
        again = make(index, cache=cache, num_workers=workers, **options, **at(first, states))
        for step in range(first, STEPS):
            assert_same(tensors(again.load(step)), expected[step])
        again.close()


def at(step: int, states: list[OrderState]) -> dict[str, Any]:
    """Options of ``make`` for a loader that goes on after ``step`` steps."""
    return {"step": step, "state": states[step - 1]}


def test_steps_come_in_order(index: ShardIndex) -> None:
    loader = make(index)
    with pytest.raises(ValueError, match="step 1 was asked for, but the next is 0"):
        loader.load(1)
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
    again = make(index, batch=40, micro=8, cache=True, num_workers=0)
    for step in range(2):
        assert_same(tensors(again.load(step)), tensors(loader.load(step)))
    loader.close()


def test_cache_encodes_each_picture_and_caption_once(index: ShardIndex) -> None:
    encoders = CountingEncoders()
    loader = make(index, encoders=encoders, cache=True)
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
    loader = make(index, encoders=encoders, batch=200, micro=200, random_flip=True, cache=True)
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
    loader = make(index, num_workers=2)
    # Step 1 crosses an epoch border; a sample that comes twice is read once.
    first, second = (set(samples_of_step(index, step, 12)) for step in (0, 1))
    loader.load(0)
    deadline = time.monotonic() + 10
    while len(readers) < len(first) + len(second) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(readers) == len(first) + len(second)
    assert threading.current_thread().name not in readers
    loader.load(1)
    loader.close()
    assert len(readers) <= len(first) + len(second) + 12  # and those of step 2, not step 1 again


def with_bad_samples(folder: Path) -> ShardIndex:
    """24 samples; 3 is no picture, 7 has no caption, 17 is a JPEG cut short."""
    members: list[tuple[str, bytes]] = []
    for number in range(24):
        data = {3: b"not a picture", 17: picture(17, kind="JPEG")[:400]}.get(number)
        members.append((f"k{number}.png", picture(number) if data is None else data))
        if number != 7:
            members.append((f"k{number}.txt", f"caption {number % 6}".encode()))
    return build_index(str(write_tar(folder / "a.tar", members)))


BAD = {3: "not an image", 7: "no caption", 17: "truncated or damaged image"}


@pytest.mark.parametrize("decoder", ["pil", "dali"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_bad_sample_keeps_its_slot_and_nobody_else_notices(
    tmp_path: Path, index: ShardIndex, cache: bool, decoder: str
) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    (tmp_path / "whole").mkdir()
    members = [
        (f"k{n}.{kind}", data)
        for n in range(24)
        for kind, data in (("png", picture(n)), ("txt", f"caption {n % 6}".encode()))
    ]
    whole = build_index(str(write_tar(tmp_path / "whole" / "a.tar", members)))
    noted: list[tuple[int, int, str]] = []

    def note(plan: StepPlan, seen: Picture, error: BadSampleError) -> None:
        assert f"key 'k{seen.sample}'" in str(error)
        noted.append((plan.step, seen.sample, error.kind))

    bad = make(with_bad_samples(tmp_path), cache=cache, decoder=decoder, on_bad=note)
    good = make(whole)
    counts = Counter()
    for step in range(4):  # two epochs
        batch, expected = bad.load(step), tensors(good.load(step))
        found = tensors(batch)
        hurt = torch.tensor([s in BAD for s in samples_of_step(whole, step, 12)])
        assert torch.equal(found["weight"], (~hurt).float())
        for name in ("slots", "clean", "text", "pooled"):
            assert torch.equal(found[name][~hurt], expected[name][~hurt]), name
        assert torch.isfinite(found["clean"]).all()
        counts.update(dict(zip(BAD_KINDS, batch.bad_K.tolist(), strict=True)))
    bad.close()
    good.close()
    assert {kind: n for kind, n in counts.items() if n} == dict.fromkeys(BAD.values(), 2)
    assert {(sample, kind) for _, sample, kind in noted} == set(BAD.items())
    # Bad ones are not cached, but step 2 was planned before sample 17 was found bad in step 1.
    assert len(noted) == (5 if cache else 6)
    for step, sample, _ in noted:
        assert sample in samples_of_step(whole, step, 12)


def test_buckets_fill_microbatches_of_one_size(tmp_path: Path) -> None:
    """Pictures of three shapes: each microbatch has one, and its own colours."""
    sizes = [(16, 16), (24, 12), (12, 24), (30, 14)]
    members = []
    for number in range(30):
        data = picture(number, sizes[number % 4])
        members += [(f"k{number}.png", data), (f"k{number}.txt", b"x")]
    index = build_index(str(write_tar(tmp_path / "a.tar", members)))
    buckets = (Bucket(16, 32), Bucket(16, 16), Bucket(32, 16))
    shapes = np.array([sizes[number % 4] for number in range(30)])
    order = Order([OrderedSource([30], buckets_N=bucket_of(buckets, shapes))], 5, group_size=4)
    options: dict[str, Any] = {"order": order, "buckets": buckets, "group_size": 4, "batch": 8}
    loader = make(index, **options)
    halves = [make(index, mesh_of(rank, 2), **options) for rank in range(2)]
    seen = Counter()
    for step in range(9):
        batch = loader.load(step)
        parts = [m for half in halves for m in half.load(step).microbatches]
        assert len(parts) == len(batch.microbatches)
        for micro, part in zip(batch.microbatches, parts, strict=True):
            assert torch.equal(micro.clean_BCHW, part.clean_BCHW)
            draws = [batch.plan.draws[slot] for slot in micro.slots_B.tolist()]
            for draw, clean in zip(draws, micro.clean_BCHW, strict=True):
                width, height = buckets[order.bucket(draw.sample)]
                assert clean.shape == (3, height // 8, width // 8)
                colour = [draw.sample * factor % 256 / 127.5 - 1 for factor in (37, 91, 53)]
                expected = (torch.tensor(colour) - 0.25) * 2.0
                torch.testing.assert_close(clean.mean((1, 2)), expected, atol=1.0, rtol=0)
                seen[draw] += 1
    for some in (loader, *halves):
        some.close()
    assert set(seen.values()) == {1} and len(seen) == 72


def test_wrong_sizes_are_named(index: ShardIndex) -> None:
    words = r"train\.global_batch_size=12: 5 data-parallel ranks must each get whole groups of 1"
    with pytest.raises(ValueError, match=words):
        make(index, mesh_of(0, 5))
    with pytest.raises(ValueError, match=r"2 data-parallel ranks .* whole groups of 4"):
        make(index, mesh_of(0, 2), group_size=4)


def tensor_ranks(folder: str) -> dict[str, Any]:
    """On each process: load some steps; a set with bad samples; a folder that is gone."""
    mesh = Mesh.build(2)
    index = build_index(f"{folder}/good/*.tar")
    result: dict[str, Any] = {}
    for cache in (False, True):
        encoders = CountingEncoders()
        loader = make(index, mesh, encoders=encoders, micro=3, cache=cache, random_flip=True)
        steps = [tensors(loader.load(step)) for step in range(STEPS)]
        loader.close()
        result[f"cache={cache}"] = {"steps": steps, "images": encoders.images}
    noted: list[int] = []
    bad = make(
        build_index(f"{folder}/a.tar"), mesh, on_bad=lambda _, seen, __: noted.append(seen.sample)
    )
    result["bad"] = [tensors(bad.load(step)) for step in range(2)]
    result["noted"] = noted
    if mesh.rank == 1:  # something else than a bad sample, on one peer only

        def fail(*_: Any) -> bytes:
            raise DataError("disk full")

        ShardIndex.read_image = fail  # type: ignore[method-assign]
    bad.close()
    broken = make(build_index(f"{folder}/a.tar"), mesh)
    try:
        broken.load(0)
    except DataError as error:
        result["error"] = str(error)
    broken.close()
    dist.barrier()
    return result


def test_tensor_peers_share_the_work_and_hold_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    write_shards(tmp_path / "good", [9, 8], captions=6)
    index, bad_index = build_index(str(tmp_path / "good" / "*.tar")), with_bad_samples(tmp_path)
    expected, bad = reference(index, random_flip=True), reference(bad_index)

    results = run_ranks(2, tensor_ranks, str(tmp_path))
    for cache in (False, True):
        runs = [result[f"cache={cache}"] for result in results]
        for run in runs:
            for step in range(STEPS):
                assert_same(run["steps"][step], expected[step])
        alone = CountingEncoders()
        loader = make(index, encoders=alone, random_flip=True, cache=cache)
        for step in range(STEPS):
            loader.load(step)
        loader.close()
        done = [run["images"] for run in runs]
        assert sum(done) == alone.images and max(done) - min(done) <= 4
    for result in results:
        for step in range(2):
            assert_same(result["bad"][step], bad[step])
    noted = [sample for result in results for sample in result["noted"]]
    assert sorted(noted) == sorted(BAD) and results[0]["noted"] != sorted(BAD)
    assert results[1]["error"] == "disk full"
    assert "another rank of the model of data-parallel rank 0 could not" in results[0]["error"]
