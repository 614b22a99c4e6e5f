"""The schedules by name, as pure functions of the passes and the layout.

Placements: one chunk a rank for ``sequential``, ``1f1b`` and ``zero_bubble``; stage s on rank s % P
for ``interleaved_1f1b``; a V for ``zero_bubble_v``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from soar_mega.passes import Pass
from soar_mega.pipeline.actions import Action, Placement, Schedule, Step
from soar_mega.pipeline.schedules_interleaved import interleaved, most_live
from soar_mega.pipeline.schedules_links import link
from soar_mega.pipeline.schedules_planner import forwards_only
from soar_mega.pipeline.schedules_trips import (
    depth_first,
    entry_order,
    one_forward_one_backward,
)
from soar_mega.pipeline.zero_bubble import zero_bubble, zero_bubble_v

Builder = Callable[[Step], list[list[Action]]]


def one_f_one_b(step: Step) -> list[list[Action]]:
    """1F1B over all passes at once: P - r warm-up forwards with gradient on rank r.

    One rank goes microbatch by microbatch, each backward right behind its forward, so that never
    more than one pass is alive.
    """
    if step.placement.ranks == 1:
        return [depth_first(step)]
    trips, ranks = entry_order(step), step.placement.ranks
    return [one_forward_one_backward(trips, ranks - rank) for rank in range(ranks)]


def sequential(step: Step) -> list[list[Action]]:
    """Every kind of pass with a 1F1B and a flush of its own: the baseline.

    Hand-overs wait for the flush too: ``link`` holds them back.
    """
    trips, ranks = entry_order(step), step.placement.ranks
    kinds = dict.fromkeys(p.kind for p in step.passes)
    parts = [[trip for trip in trips if step.by_name[trip.pass_name].kind == k] for k in kinds]
    return [
        [action for part in parts for action in one_forward_one_backward(part, ranks - rank)]
        for rank in range(ranks)
    ]


BUILDERS: dict[str, Builder] = {
    "sequential": sequential,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved,
    "zero_bubble": zero_bubble,
    "zero_bubble_v": zero_bubble_v,
}
SCHEDULES = tuple(BUILDERS)


def virtual_stages(name: str, virtual: int | None = None) -> int:
    """Chunks a rank of a schedule.

    Args:
        name: One of ``SCHEDULES``.
        virtual: The setting; None: what the schedule takes by itself.

    Raises:
        ValueError: No such schedule, or it does not work with so many.
    """
    if name not in BUILDERS:
        raise ValueError(f"parallel.pipeline_schedule = {name!r} is none of {', '.join(SCHEDULES)}")
    several = name in ("interleaved_1f1b", "zero_bubble_v")
    chosen = virtual if virtual is not None else (2 if several else 1)
    allowed = chosen >= 2 if name == "interleaved_1f1b" else chosen == (2 if several else 1)
    if not allowed:
        rule = {"interleaved_1f1b": "2 or more", "zero_bubble_v": "2"}.get(name, "1")
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size = {chosen} with "
            f"parallel.pipeline_schedule = {name!r}, which takes {rule}: change one of them, or "
            "leave the size out"
        )
    return chosen


def live_bound(name: str, ranks: int, virtual: int, states: int = 1) -> Fraction:
    """Most microbatches a rank keeps activations of at a time.

    Args:
        name: One of ``SCHEDULES``.
        ranks: P.
        virtual: Chunks a rank.
        states: The most states that a pass with gradient has.
    """
    if name == "interleaved_1f1b":
        return Fraction(states * most_live(ranks, virtual), virtual)
    return states * ranks * (Fraction(3, 2) if name == "zero_bubble_v" else Fraction(1))


def build_schedule(
    name: str,
    passes: Sequence[Pass],
    *,
    ranks: int,
    microbatches: int,
    virtual: int | None = None,
) -> Schedule:
    """A schedule, messages included; the same on every rank that builds it.

    Args:
        name: One of ``SCHEDULES``.
        passes: As the objective declares them.
        ranks: P, pipeline ranks.
        microbatches: M, microbatches of the step on one data-parallel rank.
        virtual: Chunks a rank; None: 2 for ``interleaved_1f1b`` and ``zero_bubble_v``, else 1.

    Raises:
        ValueError: No such schedule, the wrong number of chunks, or passes no schedule can order.
    """
    chunks = virtual_stages(name, virtual)
    if passes and not passes[0].grad:
        raise ValueError(f"the first pass, {passes[0].name}, must have a gradient")
    step = Step(Placement(ranks, chunks, name == "zero_bubble_v"), tuple(passes), microbatches)
    bound = live_bound(name, ranks, chunks, max(p.states for p in passes if p.grad))
    actions = link(step, BUILDERS[name](step), flush=name == "sequential")
    return Schedule(name, step, tuple(tuple(rank) for rank in actions), bound)


def build_forwards(placement: Placement, microbatches: int) -> Schedule:
    """A schedule of one forward of each microbatch, without gradient: validation and sampling."""
    step = Step(placement, (Pass("forward", "forward", grad=False),), microbatches)
    actions = link(step, forwards_only(step), flush=False)
    return Schedule("forward", step, tuple(tuple(rank) for rank in actions), Fraction(0))
