"""Every schedule, for any layout: complete, ordered, free of deadlock and within its memory."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from soar_mega.pipeline.actions import COMPUTE, Action, Placement, Schedule
from soar_mega.pipeline.rendezvous import Rendezvous
from soar_mega.pipeline.schedules import SCHEDULES, build_forwards, build_schedule
from soar_mega.pipeline.schedules_bounds import lower_bound
from soar_mega.pipeline.simulator import simulate
from soar_mega.pipeline.validator import problems
from tests.unit.schedule_cases import soar_passes

RELAXED = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
    "derandomize": True,
}


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(SCHEDULES))
    ranks, microbatches = draw(st.integers(1, 8)), draw(st.integers(1, 17))
    length, paths = draw(st.integers(0, 7)), draw(st.integers(1, 3))
    virtual = draw(st.integers(2, 3)) if name == "interleaved_1f1b" else None
    # A time limit, not a rule.
    assume(ranks * microbatches * (1 + length * paths) <= 600)
    passes = soar_passes(
        length * paths,
        reuse=draw(st.booleans()),
        guided=draw(st.booleans()),
        group=draw(st.integers(1, 2)),
    )
    return build_schedule(name, passes, ranks=ranks, microbatches=microbatches, virtual=virtual)


@settings(max_examples=150, **RELAXED)
@given(schedule=schedules())
def test_built_schedules_are_valid_and_never_beat_the_bound(schedule: Schedule) -> None:
    assert problems(schedule) == []
    timeline = simulate(schedule)
    assert max(timeline.peak_live) <= schedule.live_bound
    assert timeline.makespan >= float(lower_bound(schedule.name, schedule.step)) - 1e-9
    # Sends never wait: what the blocking rule costs is nothing, at the planned durations.
    if all(p.states == 1 for p in schedule.step.passes):
        sends = [e for rank in timeline.events for e in rank if e.action.kind == "send"]
        assert all(event.end - event.start < 1e-9 for event in sends)


@settings(max_examples=60, **RELAXED)
@given(
    ranks=st.integers(1, 8),
    chunks=st.integers(1, 3),
    folded=st.booleans(),
    microbatches=st.integers(1, 17),
)
def test_forwards_alone_fill_the_pipeline(
    ranks: int, chunks: int, folded: bool, microbatches: int
) -> None:
    """Valid for any placement; one chunk a rank takes no longer than it must."""
    placement = Placement(ranks, 2, folded=True) if folded else Placement(ranks, chunks)
    schedule = build_forwards(placement, microbatches)
    assert problems(schedule) == []
    timeline = simulate(schedule)
    assert max(timeline.peak_live) == 0
    if placement.chunks == 1:
        assert timeline.makespan == microbatches + ranks - 1


@settings(max_examples=20, **RELAXED)
@given(schedule=schedules(), seed=st.integers(0, 99), latency=st.sampled_from([0.0, 0.3]))
def test_no_durations_make_a_schedule_deadlock(
    schedule: Schedule, seed: int, latency: float
) -> None:
    draw = random.Random(seed)

    def duration(rank: int, action: Action) -> float:
        return draw.choice([0.01, 1.0, 30.0])

    events = Rendezvous(schedule, duration, latency).run()
    assert [len(rank) for rank in events] == [len(rank) for rank in schedule.actions]
    for rank in events:
        compute = [event for event in rank if event.action.kind in COMPUTE]
        assert all(a.end <= b.start for a, b in pairwise(compute))
