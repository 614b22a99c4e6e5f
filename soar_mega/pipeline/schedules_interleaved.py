"""Interleaved 1F1B: v chunks a rank, stage s on rank s % P; both ramps shrink by v."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from soar_mega.pipeline.actions import Action, Kind, Step
from soar_mega.pipeline.schedules_planner import Choice, Planner
from soar_mega.pipeline.schedules_trips import Trip, entry_order


def most_live(ranks: int, chunks: int) -> int:
    """Chunks' worth of activations the first rank keeps at most."""
    return 2 * (ranks - 1) + (chunks - 1) * ranks + 1


def interleaved(step: Step) -> list[list[Action]]:
    """The compute actions of each rank.

    Where microbatches divide by ranks: Megatron's order, trips in groups of P, each group through
    one chunk after the other, behind a prefix of the passes without gradient. Elsewhere groups
    would have gaps (or wait in a circle), so a few greedy plans are made and the fastest is taken.
    """
    if step.microbatches % step.placement.ranks == 0:
        return _grouped(step)
    best: list[list[Action]] = []
    ticks = None
    for deep in (True, False):
        for patient in (True, False):
            planner = Planner(step, entry_order(step))
            limit = planner.enough if ticks is None else ticks - 1
            needed = planner.run(partial(_greedy, deep=deep, patient=patient), limit)
            if needed is not None:
                best, ticks = planner.orders, needed
    return best


def _grouped(step: Step) -> list[list[Action]]:
    """The static order; the first forward of all stands before the prefix."""
    ranks, chunks = step.placement.ranks, step.placement.chunks
    trips = entry_order(step)
    groups = _groups([trip for trip in trips if not trip.grad], ranks)
    graded = _groups([trip for trip in trips if trip.grad], ranks)
    forwards = [
        (trip, trip.action(Kind.FORWARD, chunk))
        for group in groups + graded
        for chunk in range(chunks)
        for trip in group
    ]
    first = (trips[0], trips[0].action(Kind.FORWARD))
    forwards.remove(first)
    forwards.insert(0, first)
    backwards = [
        trip.action(Kind.BACKWARD, chunk)
        for group in graded
        for chunk in reversed(range(chunks))
        for trip in group
    ]
    orders = []
    for rank in range(ranks):
        warm_up = most_live(ranks, chunks) - 2 * rank
        out: list[Action] = []
        kept = done = 0
        for trip, action in forwards:
            if trip.grad:
                if kept >= warm_up:
                    out.append(backwards[done])
                    done += 1
                kept += 1
            out.append(action)
        orders.append(out + backwards[done:])
    return orders


def _groups(trips: Sequence[Trip], size: int) -> list[list[Trip]]:
    return [list(trips[at : at + size]) for at in range(0, len(trips), size)]


def _greedy(plan: Planner, rank: int, deep: bool, patient: bool) -> Choice | None:
    """A forward or a backward that is ready, the one nearest to the loss.

    A forward with gradient leaves a place free for each later chunk of the rank: the oldest trip
    under way then finds room everywhere, so the plan always goes on.

    Args:
        plan: What is done so far.
        rank: Whose turn it is.
        deep: Among forwards, prefer later chunks.
        patient: Prefer backwards as soon as the rank keeps as much as in 1F1B; else forwards, up to
            the bound of rank 0.
    """
    place, stages = plan.step.placement, plan.stages[rank]
    most = most_live(place.ranks, place.chunks)
    chunks, live = range(place.chunks), plan.live(rank)
    forwards: list[Choice] = []
    for chunk in reversed(chunks) if deep else chunks:
        trip = plan.next_trip(stages[chunk])
        if trip is None or not plan.can_forward(stages[chunk]):
            continue
        if not trip.grad or live + place.chunks - chunk <= most:
            forwards.append((Kind.FORWARD, chunk))
    backwards = [(Kind.BACKWARD, c) for c in reversed(chunks) if plan.can_input(stages[c])]
    warm = live < (most - 2 * rank if patient else most)
    return next(iter(forwards + backwards if warm else backwards + forwards), None)
