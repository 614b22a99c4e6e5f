"""Counts and verifies shards, and writes the index files that are missing."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from soar_mega.data.errors import DataError
from soar_mega.data.inspect.look import Bad, Look, Piece, compare_with_tar, cut_short, look
from soar_mega.data.processes import run_parallel
from soar_mega.data.shards.files import ShardFiles
from soar_mega.data.shards.index import Shard, ShardIndex, index_shard
from soar_mega.data.shards.patterns import find_shards
from soar_mega.data.shards.write_index import write_index

CHUNK = 256  # samples looked at between two movements of the bar


@dataclass(frozen=True)
class OpenShards:
    """Shards whose samples are known.

    Attributes:
        index: Their samples.
        recorded: Of each shard the sha256 of every image by its index file; None: it has no file.
        unusable: The other shards that were named.
    """

    index: ShardIndex
    recorded: list[list[str | None] | None]
    unusable: list[Bad]


@dataclass
class Summary:
    """What a set of shards holds.

    Attributes:
        encoded: Payloads of an encoded set, not pictures.
        verified: Every member was read.
        shards: Those that can be used.
        indexed: How many of them had an index file.
        written: Index files written now.
        bytes: Length of all of them.
        ignored: Members that belong to no sample, by reason.
        sizes_N2: Upright width and height of each picture in pixels, 0 where unknown.
        caption_lengths_N: In characters, -1 where there is no caption.
        bad: Unusable shards first, then by shard and sample.
    """

    encoded: bool
    verified: bool
    shards: int
    indexed: int
    bytes: int
    ignored: Counter[str]
    sizes_N2: np.ndarray
    caption_lengths_N: np.ndarray
    written: list[str] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """In all shards."""
        return len(self.caption_lengths_N)


def open_shards(
    shards: str | Sequence[str], *, setting: str = "data.shards", num_threads: int = 8
) -> OpenShards:
    """Find the samples, as the trainer would; shards it could not use are set apart.

    Args:
        shards: See ``build_index``.
        setting: What named them, for messages.
        num_threads: How many are opened at once.

    Raises:
        DataError: No shard matches, none can be used, or they are of both kinds.
    """
    files = ShardFiles()
    paths = find_shards(shards, setting=setting)
    found: list[Shard] = []
    recorded: list[list[str | None] | None] = []
    unusable: list[Bad] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for path, future in [(path, pool.submit(index_shard, path, files)) for path in paths]:
            try:
                found.append(future.result())
                recorded.append(_recorded(files, path))
            except DataError as error:
                unusable.append(Bad("unusable shard", path, str(error)))
    if not found:
        lines = "\n  ".join(bad.detail for bad in unusable[:5])
        raise DataError(f"{setting}={shards!r}: no shard can be used:\n  {lines}")
    if len({shard.encoded for shard in found}) > 1:
        raise DataError(f"{setting}={shards!r}: pictures and encoded shards. Name one kind.")
    return OpenShards(ShardIndex(found, files), recorded, unusable)


def _recorded(files: ShardFiles, path: str) -> list[str | None] | None:
    data = files.read_index(path)
    if data is None:
        return None
    return [sample.get("sha256") for sample in json.loads(data)["samples"]]


def inspect(
    opened: OpenShards,
    *,
    verify: bool = False,
    write_missing: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> Summary:
    """Look at every sample.

    Captions are read, and pictures whose size no index tells; headers only are decoded.

    Args:
        opened: The shards.
        verify: Read everything: member headers against index, sha256 against index, and every
            picture through the trainer's decoder.
        write_missing: Write the index files that are missing, each when its shard is done.
        workers: Processes; 1 works in this one.
        progress: Whether to show bars.

    Raises:
        DataError: ``workers`` is below 1, or a worker was killed.
        OSError: An index cannot be written.
    """
    if workers < 1:
        raise DataError(f"--workers={workers}: must be at least 1.")
    shards = opened.index.shards
    with_index = [s for s, told in zip(shards, opened.recorded, strict=True) if told is not None]
    faults: dict[str, list[Bad]] = defaultdict(list)
    if verify:
        for shard in shards:
            faults[shard.path] += cut_short(shard)
        title = "tars" if progress else ""
        for path, bad in run_parallel(_tar_faults, with_index, workers, title):
            faults[path] = bad
    looks: list[list[Look]] = [[] for _ in shards]
    written: list[str] = []
    pieces = [
        piece for number in range(len(shards)) for piece in _pieces(opened, number, verify=verify)
    ]
    left = Counter(piece.number for piece in pieces)
    for done in run_parallel(look, pieces, workers, "samples" if progress else ""):
        looks[done.number].append(done)
        left[done.number] -= 1
        shard = shards[done.number]
        if not left[done.number]:
            looks[done.number].sort(key=lambda part: part.first)
            if write_missing and opened.recorded[done.number] is None:
                pictures = [p for part in looks[done.number] for p in part.pictures]
                write_index(Path(shard.path), shard, pictures)
                written.append(shard.path)
    parts = [part for of_shard in looks for part in of_shard]
    sizes = [(p.width, p.height) for part in parts for p in part.pictures]
    return Summary(
        encoded=opened.index.encoded,
        verified=verify,
        shards=len(shards),
        indexed=len(with_index),
        bytes=sum(shard.size for shard in shards),
        ignored=opened.index.ignored(),
        sizes_N2=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        caption_lengths_N=np.array([n for p in parts for n in p.caption_lengths], dtype=np.int64),
        written=sorted(written),
        bad=[
            *opened.unusable,
            *(
                bad
                for shard, of_shard in zip(shards, looks, strict=True)
                for bad in [*faults[shard.path], *(b for part in of_shard for b in part.bad)]
            ),
        ],
    )


def _pieces(opened: OpenShards, number: int, *, verify: bool) -> list[Piece]:
    shard, recorded = opened.index.shards[number], opened.recorded[number]
    made = []
    for first in range(0, len(shard.keys), CHUNK):
        rows = slice(first, first + CHUNK)
        part = replace(shard, keys=shard.keys[rows], table=shard.table[rows], ignored=Counter())
        told = recorded[rows] if verify and recorded is not None else []
        made.append(Piece(number, first, part, told, verify))
    return made


def _tar_faults(shard: Shard) -> tuple[str, list[Bad]]:
    return shard.path, compare_with_tar(shard)
