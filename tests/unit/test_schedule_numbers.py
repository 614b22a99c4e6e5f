"""Bubbles and memory of the schedules, against the project's figures and against the bounds."""

from __future__ import annotations

from fractions import Fraction

import pytest

from soar_mega.config.objective import SoarConfig
from soar_mega.objectives import make_objective
from soar_mega.pipeline.actions import COMPUTE, Action, Channel, Kind, Placement
from soar_mega.pipeline.schedules import SCHEDULES, build_schedule, virtual_stages
from soar_mega.pipeline.schedules_bounds import lower_bound
from soar_mega.pipeline.simulator import Costs, simulate
from tests.unit.schedule_cases import soar_passes

# Schedule, P, M, chunks, bubble at most, live at most.
FIGURES = [
    ("1f1b", 4, 8, 1, 0.050, 4),
    ("1f1b", 8, 8, 1, 0.107, 8),
    ("1f1b", 16, 16, 1, 0.114, 16),
    ("interleaved_1f1b", 8, 8, 2, 0.057, Fraction(23, 2)),
    ("zero_bubble", 4, 8, 1, 0.017, 4),
    ("zero_bubble", 8, 8, 1, 0.039, 8),
    ("zero_bubble", 16, 16, 1, 0.041, 16),
    ("zero_bubble_v", 4, 8, 2, 0.009, 6),
    ("zero_bubble_v", 8, 8, 2, 0.020, 12),
    ("zero_bubble_v", 16, 16, 2, 0.021, 24),
]


@pytest.mark.parametrize(("name", "ranks", "microbatches", "virtual", "bubble", "live"), FIGURES)
def test_bubble_and_memory_meet_the_figures(
    name: str, ranks: int, microbatches: int, virtual: int, bubble: float, live: Fraction
) -> None:
    schedule = build_schedule(
        name, soar_passes(6), ranks=ranks, microbatches=microbatches, virtual=virtual
    )
    timeline = simulate(schedule)
    assert schedule.live_bound == live
    assert max(timeline.peak_live) <= live
    assert timeline.bubble <= bubble
    assert timeline.makespan == pytest.approx(float(lower_bound(name, schedule.step)))
    assert timeline.work == 22 * microbatches


def test_sequential_is_the_baseline_of_three_flushes() -> None:
    timeline = simulate(build_schedule("sequential", soar_passes(6), ranks=8, microbatches=8))
    # base 1F1B, forward-only rollouts, one 1F1B over all auxiliary passes.
    assert timeline.makespan == (8 + 7) * 3 + (8 + 7) + (48 + 7) * 3
    assert round(timeline.bubble, 2) == 0.22


@pytest.mark.parametrize(
    ("ranks", "microbatches", "live"), [(4, 8, 4), (8, 8, 8), (16, 16, 18), (8, 11, 9)]
)
def test_zero_bubble_v_keeps_near_one_microbatch_a_rank(
    ranks: int, microbatches: int, live: int
) -> None:
    schedule = build_schedule(
        "zero_bubble_v", soar_passes(6), ranks=ranks, microbatches=microbatches
    )
    assert max(simulate(schedule).peak_live) == live


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "sequential"])
def test_flow_matching_has_the_textbook_bubble(name: str) -> None:
    schedule = build_schedule(name, soar_passes(0), ranks=4, microbatches=8)
    ramp = 3 * (1 if name.startswith("zero") else 3) / virtual_stages(name)
    assert simulate(schedule).makespan == pytest.approx(24 + ramp)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rank_begins_with_base_and_one_rank_needs_no_messages(name: str) -> None:
    schedule = build_schedule(name, soar_passes(2, reuse=False), ranks=3, microbatches=4)
    for actions in schedule.actions:
        first = next(action for action in actions if action.kind in COMPUTE)
        assert first == Action(Kind.FORWARD, "base", 0)
    alone = build_schedule(name, soar_passes(2), ranks=1, microbatches=3)
    assert all(action.kind in COMPUTE for action in alone.actions[0])
    assert simulate(alone).bubble == pytest.approx(0)


def test_the_hand_over_takes_one_hop_but_in_a_v() -> None:
    def hand_overs(name: str) -> int:
        schedule = build_schedule(name, soar_passes(4), ranks=4, microbatches=5)
        return sum(
            action.channel is Channel.HAND_OVER for rank in schedule.actions for action in rank
        )

    # A send and a receive a microbatch, however many passes wait for it.
    assert [hand_overs(name) for name in SCHEDULES] == [10, 10, 10, 10, 0]


def test_placements() -> None:
    loop, fold = Placement(4, 3), Placement(4, 2, folded=True)
    assert [loop.rank(stage) for stage in range(12)] == [0, 1, 2, 3] * 3
    assert [fold.rank(stage) for stage in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    for place in (loop, fold):
        for stage in range(place.stages):
            assert place.stage(place.rank(stage), place.chunk(stage)) == stage


def test_wrong_settings_are_refused_with_the_rule() -> None:
    passes = soar_passes(1)
    for name, virtual in (("1f1b", 2), ("zero_bubble", 3), ("zero_bubble_v", 1)):
        with pytest.raises(ValueError, match="virtual_pipeline_model_parallel_size"):
            build_schedule(name, passes, ranks=2, microbatches=2, virtual=virtual)
    with pytest.raises(ValueError, match="2 or more"):
        build_schedule("interleaved_1f1b", passes, ranks=2, microbatches=2, virtual=1)
    with pytest.raises(ValueError, match=r"parallel\.pipeline_schedule = 'gpipe'"):
        build_schedule("gpipe", passes, ranks=2, microbatches=2)
    with pytest.raises(ValueError, match="at least 1"):
        build_schedule("1f1b", passes, ranks=2, microbatches=0)
    with pytest.raises(ValueError, match="does not declare"):
        build_schedule("1f1b", passes[:1] + passes[2:], ranks=2, microbatches=1)


def test_costs_scale_with_stages_passes_and_latency() -> None:
    schedule = build_schedule("1f1b", soar_passes(0), ranks=2, microbatches=1)
    assert simulate(schedule, Costs(2, 3, 4, latency=0.5)).makespan == 2 + 0.5 + 2 + 7 + 0.5 + 7
    assert simulate(schedule, Costs(stage_share=(1, 3))).makespan == 4 * 3
    kinds = (Kind.FORWARD, Kind.BACKWARD)
    measured = {(kind, "base", stage): 2.0 for kind in kinds for stage in (0, 1)}
    measured[Kind.FORWARD, "base", 1] = 10.0
    assert simulate(schedule, Costs(measured=measured)).makespan == 2 + 10 + 2 + 2
    del measured[Kind.BACKWARD, "base", 1]
    with pytest.raises(ValueError, match="no measured time of a backward of base on stage 1"):
        simulate(schedule, Costs(measured=measured))
    with pytest.raises(ValueError, match="stage_share"):
        simulate(schedule, Costs(stage_share=(1.0,)))
    grouped = build_schedule("1f1b", soar_passes(3, group=2), ranks=1, microbatches=1)
    timeline = simulate(grouped)
    assert timeline.makespan == 3 + 1 + 3 * 3
    assert timeline.peak_live == (2,)


@pytest.mark.parametrize(
    "changes",
    [{}, {"reuse_base_forward": False}, {"cfg_scale_sampling": 1.0}, {"num_rollout_paths": 2}],
)
def test_the_objectives_own_passes_can_be_scheduled(changes: dict[str, float]) -> None:
    config = SoarConfig(name="soar", trajectory_length=2, **changes)
    passes = make_objective(config, shift=3.0, seed=0).passes()
    for name in SCHEDULES:
        schedule = build_schedule(name, passes, ranks=2, microbatches=2)
        assert simulate(schedule).work == 2 * sum(3 if p.grad else 1 for p in passes)
