"""The order in which trips (a pass of a microbatch) enter the pipeline, and static 1F1B over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from soar_mega.passes import Pass
from soar_mega.pipeline.actions import Action, Kind, Step


@dataclass(frozen=True, slots=True)
class Trip:
    """One pass of one microbatch."""

    pass_name: str
    microbatch: int
    grad: bool

    def action(self, kind: Kind, chunk: int = 0) -> Action:
        """An action on this trip."""
        return Action(kind, self.pass_name, self.microbatch, chunk)


def entry_order(step: Step) -> list[Trip]:
    """All trips, in the order in which the first stage takes them.

    Base of microbatch 0; then everything without gradient, which no backward follows, as a prefix;
    the other bases; then what waits for a hand-over. Microbatch by microbatch: so the passes of
    microbatch 0 can enter as soon as its own hand-over is there, and few microbatches are under way
    at a time.
    """

    def trips(passes: Iterable[Pass]) -> list[Trip]:
        return [Trip(p.name, m, p.grad) for m, p in product(range(step.microbatches), passes)]

    early = [p for p in step.passes if not p.after]
    base = trips([p for p in early if p.grad])
    prefix = trips([p for p in early if not p.grad])
    return [base[0], *prefix, *base[1:], *trips([p for p in step.passes if p.after])]


def one_forward_one_backward(trips: Sequence[Trip], warm_up: int) -> list[Action]:
    """Forwards in order; from the ``warm_up``-th one with gradient on, a backward before each."""
    out: list[Action] = []
    graded = [trip for trip in trips if trip.grad]
    forwards = backwards = 0
    for trip in trips:
        if trip.grad:
            if forwards >= warm_up:
                out.append(graded[backwards].action(Kind.BACKWARD))
                backwards += 1
            forwards += 1
        out.append(trip.action(Kind.FORWARD))
    return out + [trip.action(Kind.BACKWARD) for trip in graded[backwards:]]


def depth_first(step: Step) -> list[Action]:
    """For one rank of one chunk: all passes of a microbatch, each followed by its backward."""
    out = []
    for microbatch, p in product(range(step.microbatches), step.passes):
        trip = Trip(p.name, microbatch, p.grad)
        out.append(trip.action(Kind.FORWARD))
        if p.grad:
            out.append(trip.action(Kind.BACKWARD))
    return out
