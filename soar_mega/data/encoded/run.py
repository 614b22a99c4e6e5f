"""Encodes picture shards into an encoded set, on any number of processes.

1. ``OUT/plan.json`` fixes what the set is made of and which samples a shard gets. Every rank works
   it out and either writes it or checks that it is the same.
2. Rank r writes the shards r, r + world size, ... that are not complete: the tar, then its index.
3. The rank that finds all shards complete writes ``refused.jsonl`` and, last, ``encoded.json``.

Ranks do not talk to each other. Every file appears by rename, so a run that was killed goes on with
what is missing, on any number of ranks, and the result is, bit for bit, that of an unbroken run.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from soar_mega.config.data import RESOLUTION_STEP
from soar_mega.data.buckets import Bucket, make_buckets
from soar_mega.data.decode.make import make_decoder
from soar_mega.data.encoded.encode import SampleEncoder
from soar_mega.data.encoded.fingerprint import encoder_fingerprint
from soar_mega.data.encoded.format import (
    DESCRIPTOR,
    EMPTY,
    FORMAT_VERSION,
    Descriptor,
    PayloadLayout,
    Preprocessing,
)
from soar_mega.data.encoded.write import collect, remove_partials, write_empty, write_shard
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.errors import DataError
from soar_mega.data.model_folder import ModelFacts
from soar_mega.data.prepare.write import is_complete
from soar_mega.data.shards.index import ShardIndex
from soar_mega.data.shards.write_index import dump, replacing

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DecoderName = Literal["pil", "dali"]


@dataclass(frozen=True)
class EncodeSettings:
    """What a set follows from, besides the samples and the model folder.

    Attributes:
        resolution: Side of the square bucket in pixels.
        max_sequence_length: T5's tokens.
        max_aspect_ratio: See ``make_buckets``.
        samples_per_shard: Samples of the input a shard is made of, at most.
        decoder: See ``make_decoder``.
        dtype: The text encoders compute in it: a key of ``DTYPES``.
    """

    resolution: int
    max_sequence_length: int
    max_aspect_ratio: float = 1.0
    samples_per_shard: int = 1000
    decoder: DecoderName = "pil"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.resolution % RESOLUTION_STEP:
            raise DataError(
                f"--resolution={self.resolution}: must be a multiple of {RESOLUTION_STEP}, as "
                "data.resolution of the training."
            )
        if not 1 <= self.max_sequence_length <= 512:
            raise DataError(f"--max-sequence-length={self.max_sequence_length}: must be 1 to 512.")
        if not self.max_aspect_ratio >= 1:
            raise DataError(f"--max-aspect-ratio={self.max_aspect_ratio}: must be at least 1.")
        if self.samples_per_shard < 1:
            raise DataError(f"--samples-per-shard={self.samples_per_shard}: must be at least 1.")


@dataclass(frozen=True)
class Report:
    """What a rank found when it was done.

    Attributes:
        shards: Shards of the set.
        written: How many of them this rank wrote.
        missing: How many are not there yet: other ranks are at work on them.
        samples: In the set; 0 while shards are missing.
        refused: Samples left out, by kind; empty while shards are missing.
    """

    shards: int
    written: int
    missing: int
    samples: int
    refused: Counter[str]

    def __str__(self) -> str:
        if self.missing:
            return (
                f"wrote {self.written} of {self.shards} shards; {self.missing} are with other "
                "ranks, the last of which finishes the set"
            )
        lines = [f"{self.samples} samples in {self.shards} shards ({self.written} new)"]
        lines.append(f"{self.refused.total()} refused, listed in refused.jsonl")
        lines += [f"  {number} {kind}" for kind, number in sorted(self.refused.items())]
        return "\n".join(lines)


@dataclass(frozen=True)
class EncodeProcess:
    """How this process works; nothing of it changes the set.

    Attributes:
        rank: Of this process.
        world_size: How many processes write the set.
        device: Where to encode.
        batch_size: Samples decoded and encoded together.
        num_decode_threads: Threads that decode.
        tell: Called with a line when a shard is written.
        progress: Whether to show a bar for each shard.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    batch_size: int = 32
    num_decode_threads: int = 2
    tell: Callable[[str], None] = lambda line: None
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_decode_threads"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise DataError(f"{option}={getattr(self, name)}: must be at least 1.")


def encode(
    index: ShardIndex,
    pretrained: str | Path,
    out: Path,
    settings: EncodeSettings,
    process: EncodeProcess,
) -> Report:
    """Write this process's shards of the set, as far as they are not there.

    Args:
        index: The samples, of picture shards.
        pretrained: The diffusers folder.
        out: Folder of the set; absent, empty, or of the same set.
        settings: What to make.
        process: Who makes it.

    Raises:
        DataError: The input cannot be used, ``out`` is of another set, or every sample was refused.
        FolderError: The model folder cannot be used.
        OSError: The disk is full or a file cannot be written.
    """
    if index.encoded:
        raise DataError("SHARDS: they are encoded already. Give the picture shards.")
    facts = ModelFacts.read(pretrained)
    facts.latent_shape(settings.resolution)
    buckets = make_buckets(settings.resolution, settings.max_aspect_ratio)
    if len(buckets) > 1 and not index.sizes().all():
        raise DataError(
            f"--max-aspect-ratio={settings.max_aspect_ratio}: needs the pictures' sizes, which "
            "only index files tell. Write them with tools/inspect_data.py SHARDS --write-index, or "
            "set it to 1."
        )
    components = encoder_fingerprint(pretrained)
    rank, world_size = process.rank, process.world_size
    out.mkdir(parents=True, exist_ok=True)
    remove_partials(out, rank, world_size)
    plan = {"version": FORMAT_VERSION, "input": index.fingerprint(), "pretrained": components}
    _agree_on_plan(out, {**plan, **asdict(settings)}, rank)

    count = -(-len(index) // settings.samples_per_shard)
    paths = [out / f"encoded-{number:06d}.tar" for number in range(count)]
    ends = [len(index) * number // count for number in range(count + 1)]
    todo = {
        paths[number]: range(ends[number], ends[number + 1])
        for number in range(rank, count, world_size)
        if not is_complete(paths[number])
    }
    layout = PayloadLayout.of(facts, settings.max_sequence_length)
    if todo or not (out / EMPTY).exists():
        dtype = DTYPES[settings.dtype]
        encoders = FrozenEncoders.load(pretrained, device=process.device, dtype=dtype)
        if not (out / EMPTY).exists():
            write_empty(out / EMPTY, encoders, layout.t5_tokens, rank)
        _write_shards(todo, index, encoders, buckets, layout, settings.decoder, process)

    missing = sum(not is_complete(path) for path in paths)
    if missing:
        return Report(count, len(todo), missing, 0, Counter())
    samples, refused = collect(out / "refused.jsonl", paths, rank)
    if not samples:
        raise DataError(
            f"SHARDS: none of {len(index)} samples can be used; the reasons are in "
            f"{out / 'refused.jsonl'}."
        )
    descriptor = Descriptor(
        components=components,
        preprocessing=Preprocessing(settings.resolution, buckets, settings.max_sequence_length),
        payload=layout,
        pretrained=str(pretrained),
        dtype=settings.dtype,
        decoder=settings.decoder,
        shards=count,
        samples=samples,
        refused=dict(sorted(refused.items())),
    )
    with replacing(out / DESCRIPTOR, rank) as file:
        file.write(descriptor.to_json())
    return Report(count, len(todo), 0, samples, refused)


def _write_shards(
    todo: dict[Path, range],
    index: ShardIndex,
    encoders: FrozenEncoders,
    buckets: tuple[Bucket, ...],
    layout: PayloadLayout,
    decoder_name: DecoderName,
    process: EncodeProcess,
) -> None:
    from tqdm import tqdm

    device_id = encoders.device.index  # of the CPU: None
    decoder = make_decoder(decoder_name, process.num_decode_threads, device_id=device_id)
    worker = SampleEncoder(index, buckets, encoders, layout, decoder, process.batch_size)
    try:
        for number, (path, samples) in enumerate(todo.items(), 1):
            began = time.monotonic()
            hidden, total = not process.progress, len(samples)
            results = tqdm(worker.encode(samples), path.name, total, leave=False, disable=hidden)
            kept = write_shard(path, index, results, process.rank)
            speed = total / (time.monotonic() - began)
            process.tell(
                f"{path.name} ({number} of {len(todo)}): {kept} samples, {total - kept} refused, "
                f"{speed:.1f} samples/s"
            )
    finally:
        decoder.close()


_OPTIONS = {"input": "SHARDS", "version": "version of the format"}


def _agree_on_plan(out: Path, plan: dict[str, Any], rank: int) -> None:
    # Looked for first: another rank's plan is there before its shards.
    shards = any(out.glob("*.tar"))
    path = out / "plan.json"
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        if shards:
            raise DataError(
                f"--out={str(out)!r}: has shards but no plan.json, so they are not of this "
                "program. Choose an empty folder."
            ) from None
        with replacing(path, rank) as file:
            file.write(dump(plan))
        return
    if before != plan:
        names = [
            _OPTIONS.get(name, "--" + name.replace("_", "-"))
            for name in plan
            if before.get(name) != plan[name]
        ]
        raise DataError(
            f"--out={str(out)!r}: its plan.json is of another set: other {', '.join(names)}. Give "
            "the same again to go on, or choose an empty folder."
        )
