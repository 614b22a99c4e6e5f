"""Which steps are skipped, and what is remembered of them."""

from __future__ import annotations

import json
import math
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soar_mega.config.schema import TrainConfig
from soar_mega.training.health import FEWEST, WINDOW, Health

NAN, INF = math.nan, math.inf
BATCH = {"max_train_steps": 1, "micro_batch_size": 1, "global_batch_size": 1}
FACTOR, BOUND = 100.0, 3


def policy(**settings: Any) -> TrainConfig:
    chosen = {"spike_factor": FACTOR, "max_skipped_steps": BOUND} | settings
    return TrainConfig.model_validate(BATCH | chosen)


def warmed(loss: float = 1.0, norm: float = 2.0, **settings: Any) -> Health:
    """After as many accepted steps as a median needs."""
    health = Health(policy(**settings))
    assert all(health.judge(loss, norm) for _ in range(FEWEST))
    return health


VALUES = st.one_of(
    st.sampled_from([NAN, INF, -INF, 0.0, 1e300]),
    st.floats(0.5, 2.0),
    st.floats(1e-3, 1e5),
)
STEPS = st.lists(st.tuples(VALUES, VALUES), max_size=3 * FEWEST)
# Enough like values before them, in most cases, that spikes are looked for.
HISTORIES = st.builds(
    lambda count, steps: [(1.0, 2.0)] * count + steps, st.integers(0, 2 * FEWEST), STEPS
)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["train/loss", "optim/grad_norm"])
def test_what_is_not_finite_is_skipped(which: str, value: float) -> None:
    """From the first step on, also where spikes are not looked for; the next step is not."""
    health = Health(policy(spike_factor=None))
    values = (value, 2.0) if which == "train/loss" else (1.0, value)
    assert not health.judge(*values)
    assert health.problem == f"{which} is {value}"
    assert (health.ok, health.skipped_steps, health.skipped_in_a_row) == (False, 1, 1)
    assert health.judge(1.0, 2.0)
    assert (health.ok, health.problem, health.skipped_in_a_row) == (True, None, 0)
    assert health.metrics == {"health/skipped_steps": 1.0}


def test_spikes() -> None:
    """More than so many times the median, of either value."""
    assert warmed().judge(100.0, 200.0)
    for loss, norm, words in [
        (100.1, 2.0, "train/loss is 100.1"),
        (1.0, 201.0, "grad_norm is 201"),
    ]:
        health = warmed()
        assert not health.judge(loss, norm)
        assert health.problem is not None
        for word in (words, "100.", f"the last {FEWEST} accepted", "train.spike_factor allows 100"):
            assert word in health.problem
        assert health.judge(1.0, 2.0)
    assert warmed(spike_factor=None).judge(1e30, 1e30)


def test_the_first_steps_may_be_anything_finite() -> None:
    health = Health(policy())
    for step in range(FEWEST):
        assert health.judge(10.0 ** (step % 2 * 8), 10.0 ** (step % 3 * 9))


def test_no_multiple_of_zero() -> None:
    assert warmed(loss=0.0, norm=0.0).judge(5.0, 5.0)


def test_bound() -> None:
    """So many in a row are survived, and every accepted step counts anew."""
    health = Health(policy())
    for _ in range(3):
        for _ in range(BOUND):
            assert not health.judge(NAN, 1.0) and not health.exhausted
        assert health.judge(1.0, 1.0) and not health.exhausted
    assert health.skipped_steps == 3 * BOUND
    for number in range(1, BOUND + 2):
        health.judge(1.0, INF)
        assert health.exhausted == (number > BOUND)
    at_once = Health(policy(max_skipped_steps=0))
    at_once.judge(NAN, NAN)
    assert at_once.exhausted


@given(HISTORIES)
def test_the_window_holds_the_last_accepted_values(steps: list[tuple[float, float]]) -> None:
    """Never one that is not finite, and each decision is that of the plain rule over them."""
    health, accepted = Health(policy()), []
    for step in steps:
        recent = accepted[-WINDOW:]
        expected = all(map(math.isfinite, step))
        if expected and len(recent) >= FEWEST:
            for value, before in zip(step, zip(*recent, strict=True), strict=True):
                usual = median(before)
                expected = expected and not (usual > 0 and value > FACTOR * usual)
        assert health.judge(*step) == expected == (health.problem is None) == health.ok
        if expected:
            accepted.append(step)
    kept = health.state()["accepted"]
    assert list(zip(*kept.values(), strict=True)) == accepted[-WINDOW:]
    assert health.skipped_steps == len(steps) - len(accepted)


@given(HISTORIES, STEPS)
def test_skipped_steps_do_not_change_what_is_decided(
    steps: list[tuple[float, float]], following: list[tuple[float, float]]
) -> None:
    """A run that never met the skipped ones goes on in the same way."""
    one, other = Health(policy()), Health(policy())
    for step in steps:
        if one.judge(*step):
            assert other.judge(*step)
    assert [one.judge(*step) for step in following] == [other.judge(*step) for step in following]


@given(HISTORIES, STEPS)
def test_resumed_decides_as_unbroken(
    steps: list[tuple[float, float]], following: list[tuple[float, float]]
) -> None:
    """Through a file."""
    health = Health(policy())
    for step in steps:
        health.judge(*step)
    resumed = Health.from_state(json.loads(json.dumps(health.state(), allow_nan=False)), policy())
    for step in following:
        assert resumed.judge(*step) == health.judge(*step)
        assert (resumed.ok, resumed.exhausted) == (health.ok, health.exhausted)
    assert resumed.state() == health.state()
    assert resumed.metrics == health.metrics


def test_the_oldest_values_go() -> None:
    """After a whole window of another level that level is the usual one."""
    health = warmed()
    for _ in range(WINDOW):
        assert health.judge(50.0, 50.0)
    assert health.judge(4000.0, 4000.0)
    assert not warmed().judge(4000.0, 4000.0)


def damaged(**changes: Any) -> dict[str, Any]:
    return warmed().state() | changes


def lists(losses: Any, norms: Any) -> dict[str, Any]:
    return damaged(accepted={"train/loss": losses, "optim/grad_norm": norms})


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {},
        damaged(accepted=None),
        damaged(accepted={"train/loss": [1.0]}),
        lists([1.0], [1.0, 2.0]),
        lists([1.0] * (WINDOW + 1), [1.0] * (WINDOW + 1)),
        lists([1.0], [NAN]),
        lists([INF], [1.0]),
        lists([1.0], ["1.0"]),
        lists([True], [1.0]),
        lists("1", "1"),
        damaged(skipped_steps=-1),
        damaged(skipped_steps=1.0),
        damaged(skipped_steps=True, skipped_in_a_row=True),
        damaged(skipped_in_a_row=1),
        damaged(skipped_in_a_row=-1),
        damaged(skipped_in_a_row=None),
    ],
)
def test_damaged_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"recorded|no counts"):
        Health.from_state(state, policy())
