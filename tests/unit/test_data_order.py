"""The global order: every epoch exactly, nothing dropped, and a position that is all there is."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.data.errors import DataError
from soar_mega.data.order import Draw, EpochOrder, Order, OrderedSource, epoch_order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Up to three sources of up to five shards, in up to four buckets."""
    sources = []
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
        buckets = draw(st.lists(st.integers(0, 3), min_size=sum(sizes), max_size=sum(sizes)))
        weight = draw(st.floats(0.1, 10))
        sources.append(OrderedSource(sizes, weight, np.array(buckets)))
    return Order(
        sources,
        draw(st.integers(0, 2**63)),
        group_size=draw(st.integers(1, 6)),
        window=draw(st.none() | st.integers(1, 6)),
    )


@settings(max_examples=60, deadline=None)
@given(order=orders(), cuts=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_any_cut_gives_the_same_stream(order: Order, cuts: list[int]) -> None:
    whole, end = order.take(order.start, sum(cuts))
    parts: list[Draw] = []
    state = order.start
    for groups in cuts:
        # As a resumed run: through JSON, with nothing kept from before.
        state = order.parse(json.loads(json.dumps(state.to_json())))
        taken, state = order.take(state, groups)
        parts += taken
    assert (parts, state) == (whole, end)


@settings(max_examples=60, deadline=None)
@given(order=orders(), groups=st.integers(0, 60))
def test_every_draw_is_in_a_step_or_waits_and_groups_are_of_one_bucket(
    order: Order, groups: int
) -> None:
    taken, state = order.take(order.start, groups)
    size = order._group_size
    assert len(taken) == groups * size
    for start in range(0, len(taken), size):
        assert len({order.bucket(d.sample) for d in taken[start : start + size]}) == 1
    waiting = Counter(order.bucket(d.sample) for d in state.waiting)
    assert all(n < size for n in waiting.values())
    # Of each source: all samples of the epochs gone by, and some of the one under way, once each.
    firsts = np.cumsum([0, *order.sizes])
    seen = Counter([*taken, *state.waiting])
    assert set(seen.values()) <= {1}
    for source, drawn in enumerate(state.draws):
        samples = range(firsts[source], firsts[source + 1])
        epochs, rest = divmod(drawn, len(samples))
        for epoch in range(epochs):
            assert all(seen[Draw(epoch, sample)] for sample in samples)
        assert sum(seen[Draw(epochs, sample)] for sample in samples) == rest
    assert len(seen) == sum(state.draws)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    window=st.integers(1, 10),
    seed=st.integers(0, 2**63),
)
def test_a_window_is_read_before_the_next(sizes: list[int], window: int, seed: int) -> None:
    order, shards, ends = epoch_order(sizes, seed, 2, window=window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(sizes)))
    assert {len(some) for some in shards[:-1]} <= {window} and len(shards[-1]) <= window
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    start = 0
    for some, end in zip(shards, ends.tolist(), strict=True):
        assert set(shard_of[order[start:end]].tolist()) <= set(some.tolist())
        start = end
    assert start == sum(sizes)


def test_the_shards_ahead_are_those_that_come_next() -> None:
    order = Order([OrderedSource([4, 4, 4]), OrderedSource([3, 3], weight=2)], 5, window=1)
    state = order.start
    shard_of = np.repeat(np.arange(5), [4, 4, 4, 3, 3])
    for _ in range(40):
        ahead = order.shards_ahead(state)
        coming, _ = order.take(state, 3)  # no more than a window of either source
        assert {int(shard_of[draw.sample]) for draw in coming} <= set(ahead)
        _, state = order.take(state, 1)


def test_mixtures_keep_to_their_weights_all_the_time() -> None:
    weights = [5.0, 3.0, 1.5]
    order = Order([OrderedSource([7], weight) for weight in weights], 0)
    state = order.start
    for total in range(1, 400):
        _, state = order.take(state, 1)
        for drawn, weight in zip(state.draws, weights, strict=True):
            assert abs(drawn - total * weight / sum(weights)) < 1.5


def test_seeds_and_epochs_differ_and_the_order_looks_random() -> None:
    n = 4096
    found = [epoch_order([n], seed, epoch).order_N for seed in (0, 1) for epoch in (0, 1)]
    found.append(epoch_order([n], 0, 0, source=1).order_N)
    for a in range(len(found)):
        for b in range(a):
            # Random permutations agree in one place on average.
            assert int((found[a] == found[b]).sum()) < 12
    assert abs(float(np.corrcoef(np.arange(n), found[0])[0, 1])) < 0.06
    shards = np.concatenate(epoch_order([1] * n, 0, 0, window=1).window_shards)
    assert int((shards == found[0]).sum()) < 12


def test_known_order() -> None:
    """A change of generator or of the keys would break the resume of every run: notice it."""
    assert epoch_order([10], 0, 0).order_N.tolist() == [0, 1, 8, 2, 6, 5, 9, 3, 4, 7]
    assert epoch_order([4, 6], 0, 0).order_N.tolist() == [0, 1, 8, 2, 6, 5, 9, 3, 4, 7]
    assert epoch_order([4, 3, 3], 0, 0, window=1).order_N.tolist() == [0, 1, 2, 3, 8, 9, 7, 6, 5, 4]
    second = epoch_order([4, 3, 3], 0, 0, window=2, source=1).order_N
    assert second.tolist() == [3, 6, 1, 4, 2, 5, 0, 8, 7, 9]


def test_large_sets_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = epoch_order([600, 400], 3, 2).order_N
    monkeypatch.setattr("soar_mega.data.order._CHUNK", 64)
    assert (epoch_order([600, 400], 3, 2).order_N == whole).all()


def test_large_sets_have_their_next_epoch_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [OrderedSource([30, 20]), OrderedSource([40])]
    expected = Order(sources, 1, window=1).take(Order(sources, 1).start, 400)
    monkeypatch.setattr("soar_mega.data.order._LARGE", 45)
    threads: list[tuple[int, str]] = []

    def spy(*arguments: Any, **options: Any) -> EpochOrder:
        threads.append((arguments[2], threading.current_thread().name[:5]))
        return epoch_order(*arguments, **options)

    monkeypatch.setattr("soar_mega.data.order.epoch_order", spy)
    order = Order(sources, 1, window=1)
    assert order.take(order.start, 400) == expected
    ahead = [epoch for epoch, name in threads if name == "order"]
    assert sorted(ahead) == [0, 1, 2, 3, 4]  # four epochs of the first source and one more
    assert len(threads) == 5 + 5  # and five of the second


def test_a_smaller_group_takes_what_waited_first() -> None:
    source = OrderedSource([12], buckets_N=np.arange(12) % 3)
    large, small = (Order([source], 1, group_size=size) for size in (4, 2))
    _, state = large.take(large.start, 1)
    assert len(state.waiting) == 5
    taken, after = small.take(state, 1)
    assert set(taken) < set(state.waiting) and after.draws == state.draws
    assert sorted([*taken, *after.waiting]) == sorted(state.waiting)


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        [],
        {"draws": [3]},
        {"draws": [3, 3], "waiting": []},
        {"draws": [-1], "waiting": []},
        {"draws": [1.5], "waiting": []},
        {"draws": [True], "waiting": []},
        {"draws": ["3"], "waiting": []},
        {"draws": [3], "waiting": [3]},
        {"draws": [3], "waiting": [[0, 10]]},
        {"draws": [3], "waiting": [[1, 2]]},
        {"draws": [3], "waiting": [[0]]},
    ],
)
def test_a_damaged_position_is_refused(record: object) -> None:
    order = Order([OrderedSource([10])], 0, group_size=2)
    with pytest.raises(DataError, match="saved data position"):
        order.parse(record)


def test_no_samples_is_an_error() -> None:
    for sources in ([], [OrderedSource([0])], [OrderedSource([3]), OrderedSource([])]):
        with pytest.raises(ValueError, match="at least one"):
            Order(sources, 0)
