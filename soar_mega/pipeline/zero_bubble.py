"""Zero-bubble orders: a backward's two halves apart, weight gradients where there is a gap.

``zero_bubble`` is ZB-H1 behind the rollouts, one chunk a rank. ``zero_bubble_v`` has two chunks a
rank, placed as a V.
"""

from __future__ import annotations

from soar_mega.pipeline.actions import Action, Kind, Step
from soar_mega.pipeline.schedules_planner import Choice, Planner
from soar_mega.pipeline.schedules_trips import entry_order

F, I, W = Kind.FORWARD, Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD  # noqa: E741


def zero_bubble(step: Step) -> list[list[Action]]:
    """ZB-H1: at most P live, and only the first microbatch's way to the last rank as bubble.

    Rank r does P - r warm-up forwards with gradient, then an input gradient before each forward,
    and a weight gradient only when one more forward would make P + 1 live. Where the next of these
    is not ready, and behind the last forward, any input gradient goes, else any weight gradient.
    """
    ranks = step.placement.ranks

    def policy(plan: Planner, rank: int) -> Choice | None:
        trip = plan.next_trip(rank)
        if trip is not None:
            under_way = plan.kept[rank] - plan.inputs[rank]
            if not trip.grad or (under_way < ranks - rank and plan.live(rank) < ranks):
                if plan.can_forward(rank):
                    return F, 0
            elif under_way < ranks - rank and plan.can_weight(rank):
                return W, 0
        if plan.can_input(rank):
            return I, 0
        return (W, 0) if plan.can_weight(rank) else None

    planner = Planner(step, entry_order(step))
    planner.run(policy, planner.enough)
    return planner.orders


def zero_bubble_v(step: Step) -> list[list[Action]]:
    """Two chunks a rank as a V: half the ramp of ``zero_bubble``, and no hop for the hand-over.

    Each rank takes what is ready of: forward of its second chunk, input gradient of its second,
    forward of its first, input gradient of its first, a weight gradient. So what is nearest to the
    loss goes first. A forward must leave its rank within the cap on live chunks; one of the first
    chunk leaves a place free for the second's, without which nothing would ever be let go.

    Caps from P live upwards are tried: the lowest that meets the lower bound wins, else the
    fastest.
    """
    ranks = step.placement.ranks
    best: list[list[Action]] = []
    ticks = None
    for cap in sorted({2 * ranks, 2 * ranks + -(-ranks // 4), 5 * ranks // 2, 3 * ranks}):

        def policy(plan: Planner, rank: int, cap: int = cap) -> Choice | None:
            down, up = plan.stages[rank]
            room = cap - plan.live(rank)
            trip = plan.next_trip(up)
            if trip and plan.can_forward(up) and (room >= 1 or not trip.grad):
                return F, 1
            if plan.can_input(up):
                return I, 1
            trip = plan.next_trip(down)
            if trip and plan.can_forward(down) and (room >= 2 or not trip.grad):
                return F, 0
            if plan.can_input(down):
                return I, 0
            return next(((W, c) for c in (0, 1) if plan.can_weight(plan.stages[rank][c])), None)

        planner = Planner(step, entry_order(step))
        needed = planner.run(policy, ticks - 1 if ticks else planner.enough)
        if needed is not None:
            best, ticks = planner.orders, needed
            if needed == planner.work + ranks - 1:
                break
    return best
