"""What no schedule of a kind can beat, at forward 1, input gradient 1, weight gradient 1 a rank.

Of rank r: it cannot begin before microbatch 0 has come down to it; before the first hand-over has
let an auxiliary pass through it has only the other passes to do; and behind its last fused backward
come those of the ranks before it. Of the first auxiliary pass: it goes through all stages twice.
"""

from __future__ import annotations

from fractions import Fraction

from soar_mega.pipeline.actions import Step

SPLIT = ("zero_bubble", "zero_bubble_v")


def lower_bound(name: str, step: Step) -> Fraction:
    """Least makespan of a step under a schedule's placement and kind of backward.

    With enough microbatches (M >= P / 2, about) it is work plus ramp: the ramp is
    ``(P - 1) 3 / v`` with fused backwards and ``(P - 1) / v`` with split ones.
    """
    place = step.placement
    split = name in SPLIT
    slot, backward = Fraction(1, place.chunks), 1 if split else 2
    early = [p for p in step.passes if not p.after]
    work = step.microbatches * sum(p.states * (3 if p.grad else 1) for p in step.passes)
    # Work that needs no hand-over: forwards, and gradients once they can have come back.
    forwards = step.microbatches * sum(p.states for p in early)
    gradients = step.microbatches * sum(2 * p.states for p in early if p.grad)
    handed = place.ranks + slot * (len(step.awaited) - 1)
    bounds = []
    for rank in range(place.ranks):
        idle = slot * rank
        if step.awaited:
            way_back = rank if place.folded else place.ranks - 1 - rank
            gradient = place.ranks + slot * backward * way_back
            until = handed + slot * rank
            possible = forwards + min(Fraction(gradients), max(until - gradient, Fraction(0)))
            idle = max(idle, until - possible)
        tail = Fraction(0) if split else slot * backward * rank
        bounds.append(idle + work + tail)
    chain = place.ranks * (1 + backward) + (slot if split else 0)
    return max(*bounds, chain + (handed if step.awaited else Fraction(0)))
