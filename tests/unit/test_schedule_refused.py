"""Schedules that are spoilt a little, each of which the validator must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.pipeline.actions import COMPUTE, Action, Kind, Schedule
from soar_mega.pipeline.rendezvous import ScheduleError
from soar_mega.pipeline.schedules import SCHEDULES, build_schedule
from soar_mega.pipeline.validator import problems, validate
from tests.unit.schedule_cases import soar_passes


@cache
def healthy(name: str) -> Schedule:
    return build_schedule(name, soar_passes(2), ranks=3, microbatches=4)


def with_rank(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    lists = list(schedule.actions)
    lists[rank] = tuple(actions)
    return replace(schedule, actions=tuple(lists))


def moved(actions: tuple[Action, ...], action: Action, after: Action) -> list[Action]:
    rest = [a for a in actions if a != action]
    at = rest.index(after) + 1
    return [*rest[:at], action, *rest[at:]]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data(), name=st.sampled_from(SCHEDULES), rank=st.integers(0, 2))
def test_a_dropped_or_repeated_action_is_refused(data: st.DataObject, name: str, rank: int) -> None:
    schedule = healthy(name)
    actions = list(schedule.actions[rank])
    at = data.draw(st.integers(0, len(actions) - 1))
    assert problems(with_rank(schedule, rank, actions[:at] + actions[at + 1 :]))
    twice = data.draw(st.integers(0, len(actions)))
    assert problems(with_rank(schedule, rank, [*actions[:twice], actions[at], *actions[twice:]]))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data(), name=st.sampled_from(SCHEDULES), rank=st.integers(0, 2))
def test_a_receive_posted_too_late_is_a_deadlock_that_names_who_waits(
    data: st.DataObject, name: str, rank: int
) -> None:
    schedule = healthy(name)
    actions, step = schedule.actions[rank], schedule.step
    receive = data.draw(st.sampled_from([a for a in actions if a.kind is Kind.RECEIVE]))
    message = step.message(rank, receive)
    user = next(a for a in actions if a.kind in COMPUTE and step.needs(rank, a) == message)
    with pytest.raises(ScheduleError, match=r"deadlock|where rank") as error:
        validate(with_rank(schedule, rank, moved(actions, receive, user)))
    if "deadlock" in error.value.problems:
        assert f"rank {rank} at" in str(error.value)
        assert "waits for" in str(error.value)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", [Kind.SEND, Kind.RECEIVE])
def test_two_messages_of_a_link_swapped_are_refused(name: str, kind: Kind) -> None:
    schedule = healthy(name)
    rank = 0 if kind is Kind.SEND else 1
    actions = list(schedule.actions[rank])
    at = [i for i, a in enumerate(actions) if a.kind is kind and a.channel == "activation"]
    peer = actions[at[0]].peer
    first, second = [i for i in at if actions[i].peer == peer][:2]
    actions[first], actions[second] = actions[second], actions[first]
    with pytest.raises(ScheduleError, match=r"expects|waits for"):
        validate(with_rank(schedule, rank, actions))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data(), name=st.sampled_from(SCHEDULES), rank=st.integers(0, 2))
def test_a_backward_before_its_forward_is_refused(
    data: st.DataObject, name: str, rank: int
) -> None:
    schedule = healthy(name)
    actions = schedule.actions[rank]
    later = {Kind.BACKWARD: Kind.FORWARD, Kind.INPUT_BACKWARD: Kind.FORWARD}
    later[Kind.WEIGHT_BACKWARD] = Kind.INPUT_BACKWARD
    action = data.draw(st.sampled_from([a for a in actions if a.kind in later]))
    before = replace(action, kind=later[action.kind])
    with pytest.raises(ScheduleError, match=r"deadlock|another order"):
        validate(with_rank(schedule, rank, moved(actions, before, action)))


def swap_first(actions: list[Action]) -> None:
    first, second = [i for i, a in enumerate(actions) if a.kind in COMPUTE][:2]
    actions[first], actions[second] = actions[second], actions[first]


def swap_weights(actions: list[Action]) -> None:
    first, *_, last = [i for i, a in enumerate(actions) if a.kind is Kind.WEIGHT_BACKWARD]
    actions[first], actions[last] = actions[last], actions[first]


def differentiate_rollout(actions: list[Action]) -> None:
    actions.append(Action(Kind.BACKWARD, "rollout", 0))


def split_twice(actions: list[Action]) -> None:
    actions.append(Action(Kind.BACKWARD, "base", 0))


def leave_the_step(actions: list[Action]) -> None:
    actions.append(Action(Kind.FORWARD, "base", 4))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (swap_first, "begins with"),
        (swap_weights, "another order"),
        (differentiate_rollout, "without gradient"),
        (split_twice, "1 backwards, 1 input backwards"),
        (leave_the_step, "there is not"),
    ],
)
def test_other_breaches_are_named(spoil: Callable[[list[Action]], None], words: str) -> None:
    schedule = healthy("zero_bubble")
    for rank in range(3):
        actions = list(schedule.actions[rank])
        spoil(actions)
        with pytest.raises(ScheduleError, match=words):
            validate(with_rank(schedule, rank, actions))


@pytest.mark.parametrize("name", SCHEDULES)
def test_too_much_kept_is_refused(name: str) -> None:
    schedule = healthy(name)
    with pytest.raises(ScheduleError, match=r"more than the bound of 1\.5"):
        validate(replace(schedule, live_bound=Fraction(3, 2)))


def test_an_auxiliary_pass_ahead_of_its_hand_over_is_a_deadlock() -> None:
    schedule = healthy("1f1b")
    aux = Action(Kind.FORWARD, "aux0", 0)
    lists = []
    for rank in schedule.actions:
        rest = [a for a in rank if a != aux]
        first = next(i for i, a in enumerate(rest) if a.kind in COMPUTE)
        lists.append((*rest[: first + 1], aux, *rest[first + 1 :]))
    with pytest.raises(ScheduleError, match=r"rank 0 at forward aux0 of microbatch 0.*hand_over"):
        validate(replace(schedule, actions=tuple(lists)))


def test_a_missing_list_is_refused() -> None:
    schedule = healthy("1f1b")
    assert problems(replace(schedule, actions=schedule.actions[:2])) == ["2 lists for 3 ranks"]
