"""From the ``data`` section to the samples and their order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from soar_mega.config.data import DataConfig
from soar_mega.data.buckets import Bucket, bucket_of, make_buckets
from soar_mega.data.encoded.read import EncodedSet
from soar_mega.data.errors import DataError
from soar_mega.data.order import Order, OrderedSource, OrderState
from soar_mega.data.shards.files import ShardFiles
from soar_mega.data.shards.index import ShardIndex, build_index, check_cache


@dataclass(frozen=True)
class TrainingData:
    """What there is to train on.

    Attributes:
        index: The samples of all sources, one source after the other.
        source_names: One for each source.
        source_shards: How many shards each has.
        buckets: Sizes that pictures are brought to.
        order: Which sample comes when.
        encoded: The payloads, where the samples are encoded.
    """

    index: ShardIndex
    source_names: tuple[str, ...]
    source_shards: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    order: Order
    encoded: EncodedSet | None

    def epochs(self, state: OrderState) -> dict[str, float]:
        """How often each source was drawn through, with the fraction of the epoch under way."""
        sizes = self.order.sizes
        counts = zip(self.source_names, state.draws, sizes, strict=True)
        return {name: drawn / size for name, drawn, size in counts}

    def fingerprint(self) -> str:
        """sha256 (hex) of all that the order hangs on: shards, keys, sources and, where there are
        several, the bucket of each sample."""
        digest = hashlib.sha256(f"{self.index.fingerprint()} {self.source_shards}".encode())
        if len(self.buckets) > 1:
            digest.update(self.order.buckets_N.tobytes())
        return digest.hexdigest()


def open_training_data(
    data: DataConfig, pretrained: str, *, seed: int, group_size: int
) -> TrainingData:
    """Index all sources; the same on every rank.

    Args:
        data: The section.
        pretrained: The model folder; encoded sets must be of its encoders.
        seed: The run's.
        group_size: Consecutive slots of one bucket.

    Raises:
        DataError: A source cannot be used, picture sizes that buckets need are not known, or an
            encoded set was made with other encoders or settings.
    """
    files = ShardFiles(data.cache_dir, int(data.cache_gb * 1e9), allow_pipe=data.allow_pipe)
    if data.sources:
        indexes = [
            build_index(_listed(source.shards), setting=f"data.sources.{source.name}", files=files)
            for source in data.sources
        ]
        names = tuple(source.name for source in data.sources)
        weights = [source.weight for source in data.sources]
    else:
        assert data.shards is not None  # or data.sources would be needed
        indexes = [build_index(_listed(data.shards), files=files)]
        names, weights = ("data.shards",), [1.0]
    if len({index.encoded for index in indexes}) > 1:
        raise DataError(
            f"data.sources={', '.join(names)}: some are encoded sets and some are pictures. Encode "
            "all with tools/encode_data.py, or none."
        )
    index = ShardIndex([shard for part in indexes for shard in part.shards], files)
    check_cache([part.shards for part in indexes], data.shuffle_shards, files)
    buckets = make_buckets(data.resolution, data.max_aspect_ratio)
    sources = [
        OrderedSource(part.counts, weight, _buckets(part, buckets, data))
        for part, weight in zip(indexes, weights, strict=True)
    ]
    order = Order(sources, seed, group_size=group_size, window=data.shuffle_shards)
    shards = tuple(len(part.shards) for part in indexes)
    encoded = None
    if index.encoded:
        _check_stays_as_encoded(data)
        encoded = open_encoded(index, data, pretrained)
    return TrainingData(index, names, shards, buckets, order, encoded)


def open_encoded(
    index: ShardIndex, data: DataConfig, pretrained: str, *, setting: str = "data.shards"
) -> EncodedSet:
    """The encoded set of ``index``, if it fits the run.

    Raises:
        DataError: It is incomplete or was made with other encoders or settings.
    """
    encoded = EncodedSet.open(index, setting=setting, num_threads=max(data.num_workers, 1))
    encoded.check(
        pretrained,
        resolution=data.resolution,
        max_sequence_length=data.max_sequence_length,
        buckets=make_buckets(data.resolution, data.max_aspect_ratio),
        setting=setting,
    )
    return encoded


def _check_stays_as_encoded(data: DataConfig) -> None:
    """Refuse what only pictures can follow; validation pictures are never changed."""
    for name in ("random_flip", "random_crop", "cache_encoded"):
        if getattr(data, name):
            where = "data.sources" if data.sources else "data.shards"
            raise DataError(
                f"data.{name} = true: {where} are encoded sets, whose latents stay as they are. "
                "Set it to false, or train on the pictures."
            )


def _listed(shards: str | tuple[str, ...]) -> str | list[str]:
    return shards if isinstance(shards, str) else list(shards)


def _buckets(index: ShardIndex, buckets: tuple[Bucket, ...], data: DataConfig) -> np.ndarray | None:
    if len(buckets) == 1:
        return None
    sizes_N2 = index.sizes()
    unknown = [shard.path for shard in index.shards if len(shard.keys) and not shard.table[0, -1]]
    if unknown:
        raise DataError(
            f"data.max_aspect_ratio = {data.max_aspect_ratio:g} needs the pictures' sizes, which "
            f"only index files tell, and {len(unknown)} shards have none (first: {unknown[0]}). "
            "Write them with tools/inspect_data.py SHARDS --write-index, or set it to 1."
        )
    return bucket_of(buckets, sizes_N2)
