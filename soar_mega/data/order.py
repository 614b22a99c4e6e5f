"""Which sample stands in which slot of which step: a function of (seed, data) alone.

Each source is drawn epoch after epoch, each epoch a permutation: its shards are permuted and cut
into windows, and the samples of a window are permuted, so that a cache which holds a window reads
each shard once an epoch. A mixture draws next from the source that is furthest behind its weight.
Draws of one aspect bucket wait until they are ``group_size``, then take consecutive slots; what
waits at the end of an epoch goes on waiting in the next, so nothing is dropped.

Nothing depends on ranks, workers or what was read before. The position is a few numbers
(``OrderState``): going on from one costs the same at the start of an epoch as at its end.

Legend: N samples of a source, S its shards.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from soar_mega.data.errors import DataError
from soar_mega.rng import Purpose, uniform

_CHUNK = 1 << 18  # bounds the generator's temporaries
# From here on an epoch's order takes a tenth of a second and more, and is made before it is needed.
_LARGE = 1 << 18


@dataclass(frozen=True)
class OrderedSource:
    """What the order must know of a source.

    Attributes:
        shard_sizes: Samples of each shard.
        weight: Its share of all draws, relative to the other sources.
        buckets_N: int (N,), the aspect bucket of each sample; None: all of one.
    """

    shard_sizes: Sequence[int]
    weight: float = 1.0
    buckets_N: np.ndarray | None = None


class Draw(NamedTuple):
    """A sample, numbered over all sources, and the epoch of its source that it was drawn in."""

    epoch: int
    sample: int


@dataclass(frozen=True)
class OrderState:
    """A position in the order.

    Attributes:
        draws: How many samples each source has given.
        waiting: Drawn, but not yet in a step, in the order in which they were drawn.
    """

    draws: tuple[int, ...]
    waiting: tuple[Draw, ...] = ()

    @property
    def taken(self) -> int:
        """Samples that steps have had."""
        return sum(self.draws) - len(self.waiting)

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint; a few bytes a source and less than a group a bucket."""
        return {"draws": list(self.draws), "waiting": [list(draw) for draw in self.waiting]}


class EpochOrder(NamedTuple):
    """One epoch of one source.

    Attributes:
        order_N: int64, the samples (numbered within the source) in the order of their draws.
        window_shards: The shards of each window.
        window_ends: Draws up to the end of each window.
    """

    order_N: np.ndarray
    window_shards: list[np.ndarray]
    window_ends: np.ndarray


def epoch_order(
    shard_sizes: Sequence[int], seed: int, epoch: int, *, window: int | None = None, source: int = 0
) -> EpochOrder:
    """The permutation of one epoch.

    Sort keys of 46 bits come from two draws of the project's generator at (seed, SHUFFLE, epoch,
    sample); equal keys keep their order, so the result is the same for every version of torch.

    Args:
        shard_sizes: Samples of each shard.
        seed: The run's.
        epoch: From 0.
        window: Shards whose samples are mixed; None: all.
        source: The source's number.
    """
    sizes_S = np.asarray(shard_sizes, dtype=np.int64)
    shards_S = np.argsort(_keys(len(sizes_S), seed, epoch, source, 1), kind="stable")
    window = len(sizes_S) if window is None else window
    window_shards = [shards_S[start : start + window] for start in range(0, len(sizes_S), window)]
    order_N = np.argsort(_keys(int(sizes_S.sum()), seed, epoch, source, 0), kind="stable")
    if len(window_shards) > 1:
        window_of_shard_S = np.empty(len(sizes_S), dtype=np.int64)
        window_of_shard_S[shards_S] = np.arange(len(sizes_S)) // window
        window_of_sample_N = np.repeat(window_of_shard_S, sizes_S)
        order_N = order_N[np.argsort(window_of_sample_N[order_N], kind="stable")]
    ends = np.cumsum([int(sizes_S[shards].sum()) for shards in window_shards])
    return EpochOrder(order_N, window_shards, ends)


def _keys(count: int, seed: int, epoch: int, source: int, index: int) -> np.ndarray:
    keys_N = np.empty(count, dtype=np.int64)
    for start in range(0, count, _CHUNK):
        slots_C = torch.arange(start, min(start + _CHUNK, count))
        draws_C2 = uniform(seed, Purpose.SHUFFLE, epoch, slots_C, 2, path=source, index=index)
        high_C, low_C = (draws_C2.double() * 2**23).long().unbind(1)
        keys_N[start : start + _CHUNK] = (high_C * 2**23 + low_C).numpy()
    return keys_N


class Order:
    """The order of a training run.

    Args:
        sources: At least one, each with at least one sample; samples are numbered over all of them.
        seed: The run's seed.
        group_size: Consecutive slots of one bucket.
        window: Shards of a source whose samples are mixed; None: all.

    Attributes:
        sizes: Samples of each source.
        buckets_N: The bucket of each sample, over all sources.
    """

    def __init__(
        self,
        sources: Sequence[OrderedSource],
        seed: int,
        *,
        group_size: int = 1,
        window: int | None = None,
    ) -> None:
        self._seed, self._group_size, self._window = seed, group_size, window
        self._shard_sizes = [list(source.shard_sizes) for source in sources]
        self.sizes = [sum(sizes) for sizes in self._shard_sizes]
        if not sources or min(self.sizes) < 1:
            raise ValueError(f"sources of {self.sizes} samples: each needs at least one")
        self._firsts = np.cumsum([0, *self.sizes]).tolist()
        self._first_shards = np.cumsum([0, *map(len, self._shard_sizes)]).tolist()
        total = sum(source.weight for source in sources)
        self._weights = [source.weight / total for source in sources]
        parts = [
            np.zeros(size, dtype=np.int64) if source.buckets_N is None else source.buckets_N
            for source, size in zip(sources, self.sizes, strict=True)
        ]
        self.buckets_N = np.concatenate(parts)
        self._epochs: dict[tuple[int, int], EpochOrder] = {}
        self._coming: dict[tuple[int, int], Future[EpochOrder]] = {}
        self._pool = ThreadPoolExecutor(2, "order")  # starts no thread before it is used

    @property
    def start(self) -> OrderState:
        """Before the first draw."""
        return OrderState((0,) * len(self.sizes))

    def bucket(self, sample: int) -> int:
        """The bucket of a sample."""
        return int(self.buckets_N[sample])

    def take(self, state: OrderState, groups: int) -> tuple[list[Draw], OrderState]:
        """The draws of the next ``groups`` groups, in slot order, and the position after them."""
        queues: dict[int, list[tuple[int, Draw]]] = {}
        taken: list[Draw] = []
        draws, number = list(state.draws), 0

        def arrive(draw: Draw) -> None:
            nonlocal number
            queue = queues.setdefault(int(self.buckets_N[draw.sample]), [])
            queue.append((number, draw))
            number += 1
            if len(queue) == self._group_size:
                taken.extend(waited for _, waited in queue)
                queue.clear()

        wanted = groups * self._group_size
        for place, draw in enumerate(state.waiting):
            if len(taken) == wanted:  # the group size was larger when the state was saved
                left = [w for _, w in heapq.merge(*queues.values())] + list(state.waiting[place:])
                return taken, OrderState(tuple(draws), tuple(left))
            arrive(draw)
        while len(taken) < wanted:
            source = self._next_source(draws)
            arrive(self._draw(source, draws[source]))
            draws[source] += 1
        waiting = tuple(draw for _, draw in heapq.merge(*queues.values()))
        return taken, OrderState(tuple(draws), waiting)

    def shards_ahead(self, state: OrderState, windows: int = 2) -> list[int]:
        """The shards, numbered over all sources, of each source's next windows from a position,
        those needed first in front."""
        shards: list[int] = []
        for ahead in range(windows):
            for source, drawn in enumerate(state.draws):
                epoch, place = divmod(drawn, self.sizes[source])
                record = self._epoch(source, epoch)
                window = int(np.searchsorted(record.window_ends, place, side="right")) + ahead
                while window >= len(record.window_shards):
                    window -= len(record.window_shards)
                    epoch += 1
                    record = self._epoch(source, epoch)
                first = self._first_shards[source]
                shards += [first + int(shard) for shard in record.window_shards[window]]
        return list(dict.fromkeys(shards))

    def parse(self, record: object) -> OrderState:
        """The state that ``OrderState.to_json`` wrote.

        Raises:
            DataError: It is damaged or of other data; nothing of it is used then.
        """
        try:
            assert isinstance(record, dict)
            draws = tuple(_count(n) for n in record["draws"])
            waiting = tuple(Draw(_count(e), _count(s)) for e, s in record["waiting"])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"the saved data position is damaged: {record!r}") from error
        if len(draws) != len(self.sizes):
            raise DataError(
                f"the saved data position is of {len(draws)} sources; there are {len(self.sizes)}"
            )
        for draw in waiting:
            source = int(np.searchsorted(self._firsts, draw.sample, side="right")) - 1
            if source >= len(draws) or draw.epoch * self.sizes[source] >= draws[source]:
                raise DataError(f"the saved data position waits for {draw}, which was never drawn")
        return OrderState(draws, waiting)

    def _next_source(self, draws: list[int]) -> int:
        if len(draws) == 1:
            return 0
        total = sum(draws) + 1
        behind = [weight * total - n for weight, n in zip(self._weights, draws, strict=True)]
        return behind.index(max(behind))

    def _draw(self, source: int, number: int) -> Draw:
        epoch, place = divmod(number, self.sizes[source])
        sample = self._epoch(source, epoch).order_N[place]
        return Draw(epoch, self._firsts[source] + int(sample))

    def _epoch(self, source: int, epoch: int) -> EpochOrder:
        record = self._epochs.get((source, epoch))
        if record is None:
            record = self._make(source, epoch)
            for old in [key for key in self._epochs if key[0] == source and key[1] < epoch - 1]:
                del self._epochs[old]
            self._epochs[source, epoch] = record
        return record

    def _make(self, source: int, epoch: int) -> EpochOrder:
        def make(epoch: int) -> EpochOrder:
            return epoch_order(
                self._shard_sizes[source], self._seed, epoch, window=self._window, source=source
            )

        if self.sizes[source] < _LARGE:
            return make(epoch)
        for coming in (epoch, epoch + 1):
            if (source, coming) not in self._coming:
                self._coming[source, coming] = self._pool.submit(make, coming)
        return self._coming.pop((source, epoch)).result()


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
