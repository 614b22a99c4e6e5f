"""The global order: every epoch exactly, and nothing but (seed, step) decides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.data.sampler import Sampler, epoch_order


@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 60),
    batch=st.integers(1, 50),
    seed=st.integers(0, 2**63),
)
def test_epochs_are_covered_exactly_in_order(num_samples: int, batch: int, seed: int) -> None:
    sampler = Sampler(num_samples, seed)
    steps = -(-3 * num_samples // batch)
    stream = [pair for step in range(steps) for pair in sampler.samples_of_step(step, batch)]
    for epoch in range(3):
        block = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert {e for e, _ in block} == {epoch}
        assert sorted(s for _, s in block) == list(range(num_samples))


@settings(max_examples=20, deadline=None)
@given(
    num_samples=st.integers(1, 60),
    batch=st.integers(1, 50),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=6),
)
def test_a_step_is_the_same_whatever_came_before(
    num_samples: int, batch: int, steps: list[int]
) -> None:
    used = Sampler(num_samples, 7)
    for step in steps:
        fresh = Sampler(num_samples, 7)
        assert used.samples_of_step(step, batch) == fresh.samples_of_step(step, batch)


def test_any_cut_of_the_positions_gives_the_same_stream() -> None:
    sampler = Sampler(23, 1)
    _, whole_P = sampler.positions(0, 96)
    for size in (1, 7, 32):
        parts = [sampler.positions(p, min(p + size, 96))[1] for p in range(0, 96, size)]
        assert torch.equal(torch.cat(parts), whole_P)


def test_seeds_and_epochs_differ_and_the_order_looks_random() -> None:
    n = 4096
    orders = [epoch_order(n, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for a in range(4):
        for b in range(a):
            # Random permutations agree in one place on average.
            assert int((orders[a] == orders[b]).sum()) < 12
    places = torch.arange(n).double()
    correlation = torch.corrcoef(torch.stack([places, orders[0].double()]))[0, 1]
    assert abs(float(correlation)) < 0.06


def test_known_order() -> None:
    """A change of generator or of the keys would break the resume of every run: notice it."""
    assert epoch_order(10, 0, 0).tolist() == [0, 1, 8, 2, 6, 5, 9, 3, 4, 7]


def test_large_sets_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = epoch_order(1000, 3, 2)
    monkeypatch.setattr("soar_mega.data.sampler._CHUNK", 64)
    assert torch.equal(epoch_order(1000, 3, 2), whole)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_samples=0"):
        Sampler(0, 0)
