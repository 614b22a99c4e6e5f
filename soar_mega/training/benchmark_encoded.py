"""Measures how fast samples of encoded sets become batches: ours, plain webdataset, bare reads.

The set has our format, SD3.5's shapes and random numbers. Its tars lie in the page cache, so what
is measured is the work of the processor. A new buffer costs more than the bytes that go into it,
as the kernel must first give out its memory; so ours, and a bare read of the tars from front to
back, are each measured into a new buffer a batch (as training has on a CPU) and into one for all
batches (pinned memory, which torch keeps, is like that).

Legend: B samples, N bytes of a payload.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from soar_mega.data.buckets import Bucket
from soar_mega.data.encoded.encode import Encoded
from soar_mega.data.encoded.format import (
    DESCRIPTOR,
    EMPTY,
    Descriptor,
    PayloadLayout,
    Preprocessing,
)
from soar_mega.data.encoded.read import EncodedSet
from soar_mega.data.encoded.write import write_shard
from soar_mega.data.shards.index import ShardIndex, build_index
from soar_mega.data.shards.shard import Shard
from soar_mega.training.benchmark_data import plans
from soar_mega.training.benchmark_turns import alternate, summary

OURS_NEW, OURS_ONE = "ours, a new buffer a batch", "ours, one buffer for all"
RAW_NEW, RAW_ONE = "bare read, a new buffer a batch", "bare read, one buffer for all"
_SHARDS = 4
_SMALL = 2**20
_BUCKET = Bucket(512, 512)
_LAYOUT = PayloadLayout(
    latent_channels=16,
    downsampling=8,
    clip_tokens=77,
    clip_width=2048,
    t5_tokens=77,
    text_width=4096,
    pooled_width=2048,
    has_t5=True,
)


@dataclass(frozen=True)
class EncodedCase:
    """What is measured; ``threads`` read payloads for ours, the other sides have one."""

    samples: int = 256
    batch: int = 16
    micro_batch: int = 4
    threads: int = 1


def measure_encoded(case: EncodedCase, repeats: int, folder: Path) -> dict[str, Any]:
    """All sides on a set that is made in ``folder``.

    Raises:
        RuntimeError: A side gave other numbers than another.
    """
    tars = _make_set(case.samples, folder)
    index = build_index([str(tar) for tar in tars])
    encoded = EncodedSet.open(index, num_threads=case.threads)
    small_N = torch.empty(_SMALL, dtype=torch.uint8)
    one_BN = encoded.new_rows(_BUCKET, case.batch)
    # Beforehand: the order of so few samples costs much a sample, and is measured on its own.
    steps = [
        [picture.sample for picture in plan.pictures]
        for plan in plans(index.counts, case.batch, _BUCKET)
    ]

    def new_BN() -> Tensor:
        return encoded.new_rows(_BUCKET, case.batch)

    def rows(buffer: Callable[[], Tensor]) -> None:
        for _ in _rows(encoded, steps, buffer):
            pass

    def unpacked() -> float:
        total = 0.0
        for rows_BN in _rows(encoded, steps, new_BN):
            for part_BN in rows_BN.split(case.micro_batch):
                batch = encoded.unpack(part_BN, _BUCKET, torch.bfloat16)
                total += float(batch.text.pooled_BV[:, 0].double().sum())
        return total

    sides: dict[str, Callable[[], object]] = {
        OURS_NEW: lambda: rows(new_BN),
        OURS_ONE: lambda: rows(lambda: one_BN),
        "ours, new, and into microbatches": unpacked,
        "plain webdataset": lambda: _webdataset(case, tars),
        RAW_NEW: lambda: _read(tars, new_BN),
        RAW_ONE: lambda: _read(tars, lambda: one_BN),
        "bare read, one buffer of 1 MiB": lambda: _read(tars, lambda: small_N),
    }
    if not np.isclose(unpacked(), _webdataset(case, tars)):
        raise RuntimeError("ours and plain webdataset read different numbers")
    runs = alternate(sides, repeats)
    encoded.close()
    median = summary(runs, case.samples, RAW_NEW)
    speed = {name: one["times_as_fast"] for name, one in median.items()}
    return {
        "sample_bytes": _LAYOUT.size(_BUCKET),
        "tar_bytes": sum(tar.stat().st_size for tar in tars),
        "runs": {name: [run._asdict() for run in side] for name, side in runs.items()},
        "median": median,
        "ours_of_bare_read": {
            "a new buffer a batch": speed[OURS_NEW] / speed[RAW_NEW],
            "one buffer for all": speed[OURS_ONE] / speed[RAW_ONE],
        },
    }


def _rows(
    encoded: EncodedSet, steps: Sequence[list[int]], buffer: Callable[[], Tensor]
) -> Iterator[Tensor]:
    """The batch buffers of an epoch, filled, in training's order."""
    for samples in steps:
        rows_BN = buffer()
        errors = encoded.read(samples, rows_BN)
        if any(errors):
            raise RuntimeError(f"the set that was just made cannot be read: {errors}")
        yield rows_BN


def _read(tars: list[Path], buffer: Callable[[], Tensor]) -> None:
    for tar in tars:
        with open(tar, "rb", buffering=0) as file:
            while file.readinto(buffer().view(-1).numpy().data):
                pass


def _webdataset(case: EncodedCase, tars: list[Path]) -> float:
    """Bytes to tensors of a sample, stacked into a batch."""
    import webdataset

    shapes = _LAYOUT.shapes(_BUCKET)
    lengths = [int(np.prod(shape)) for shape in shapes.values()]

    def tensors(payload: bytes) -> tuple[Tensor, ...]:
        parts = torch.frombuffer(bytearray(payload), dtype=torch.bfloat16).split(lengths)
        return tuple(p.view(shape) for p, shape in zip(parts, shapes.values(), strict=True))

    def collate(samples: list[tuple[tuple[Tensor, ...], str]]) -> tuple[list[Tensor], list[str]]:
        parts, captions = zip(*samples, strict=True)
        return [torch.stack(part) for part in zip(*parts, strict=True)], list(captions)

    data = (
        webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=_SHARDS)
        .shuffle(100)
        .to_tuple("bin", "txt")
        .map_tuple(tensors, bytes.decode)
        .batched(case.batch, collation_fn=collate)
    )
    return sum(float(parts[-1][:, 0].double().sum()) for parts, _ in data)


def _make_set(samples: int, folder: Path) -> list[Path]:
    """The tars; what belongs to them lies beside them."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    numbers = _LAYOUT.size(_BUCKET) // 2

    def payload() -> np.ndarray:
        drawn_N = torch.randn(numbers, generator=generator).bfloat16()
        return drawn_N.view(torch.uint8).numpy()

    keys = [f"sample-{number}" for number in range(samples)]
    source = Shard("pictures.tar", 0, keys, np.zeros((samples, 7), dtype=np.int64), Counter())
    tars = []
    for shard in range(_SHARDS):
        tars.append(folder / f"encoded-{shard:06d}.tar")
        own = range(samples * shard // _SHARDS, samples * (shard + 1) // _SHARDS)
        made = (Encoded(number, _BUCKET, payload(), f"sample {number}") for number in own)
        write_shard(tars[-1], ShardIndex([source]), made, rank=0)
    tokens = _LAYOUT.clip_tokens + _LAYOUT.t5_tokens
    empty = {"text": (tokens, _LAYOUT.text_width), "pooled": (_LAYOUT.pooled_width,)}
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in empty.items()}
    save_file(zeros, folder / EMPTY)
    preprocessing = Preprocessing(_BUCKET.width, (_BUCKET,), _LAYOUT.t5_tokens)
    descriptor = Descriptor({}, preprocessing, _LAYOUT, "none", "bf16", "pil", _SHARDS, samples, {})
    (folder / DESCRIPTOR).write_bytes(descriptor.to_json())
    return tars
