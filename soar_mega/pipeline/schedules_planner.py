"""A clockwork for building zero-bubble orders: all ranks act tick by tick, an action a tick each.

Trips keep one order at every stage, so the state is a few counters and readiness is comparing them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from soar_mega.pipeline.actions import TAKES_GRADIENT, Action, Kind, Step
from soar_mega.pipeline.schedules_trips import Trip

# All ticks of a stage are equal, a backward's two halves likewise.
TICKS = {
    Kind.FORWARD: 1,
    Kind.BACKWARD: 2,
    Kind.INPUT_BACKWARD: 1,
    Kind.WEIGHT_BACKWARD: 1,
}
# What a policy names: forward, input gradient or weight gradient of a chunk.
Choice = tuple[Kind, int]


class Planner:
    """Counters of what every stage has done, and what it may do next.

    Attributes:
        trips: In entry order.
        forwards: Per stage, forwards done.
        kept: Per stage, those of them with gradient.
        inputs: Per stage, input gradients done.
        weights: Per stage, weight gradients done.
        orders: Per rank, the actions so far.
    """

    def __init__(self, step: Step, trips: Sequence[Trip]) -> None:
        self.step, self.trips = step, trips
        self.graded = [trip for trip in trips if trip.grad]
        place = step.placement
        self.forwards, self.kept, self.inputs, self.weights = ([0] * place.stages for _ in range(4))
        self.orders: list[list[Action]] = [[] for _ in range(place.ranks)]
        self.stages = [
            [place.stage(rank, chunk) for chunk in range(place.chunks)]
            for rank in range(place.ranks)
        ]
        self.work = place.chunks * (len(trips) + 2 * len(self.graded))
        self.left = self.work * place.ranks
        # Ticks in which any order that goes on at all is through: one rank at a time.
        self.enough = self.left
        last_of = {
            trip.microbatch: at for at, trip in enumerate(trips) if trip.pass_name in step.awaited
        }
        # How many trips must have left the last stage before this one may enter the first.
        self.waits = [
            last_of[trip.microbatch] + 1 if step.by_name[trip.pass_name].after else 0
            for trip in trips
        ]

    def next_trip(self, stage: int) -> Trip | None:
        """The trip whose forward the stage does next."""
        at = self.forwards[stage]
        return self.trips[at] if at < len(self.trips) else None

    def can_forward(self, stage: int) -> bool:
        """Whether the input of the stage's next forward is there."""
        at = self.forwards[stage]
        if at == len(self.trips):
            return False
        if stage == 0:
            return self.forwards[-1] >= self.waits[at]
        return self.forwards[stage - 1] > at

    def can_input(self, stage: int) -> bool:
        """Whether the gradient for the stage's next input gradient is there."""
        at = self.inputs[stage]
        if stage + 1 < len(self.inputs) and self.inputs[stage + 1] <= at:
            return False
        return self.kept[stage] > at

    def can_weight(self, stage: int) -> bool:
        """Whether a weight gradient is left to do."""
        return self.weights[stage] < self.inputs[stage]

    def live(self, rank: int) -> int:
        """Chunks' worth of activations the rank keeps."""
        return sum(self.kept[stage] - self.weights[stage] for stage in self.stages[rank])

    def run(self, policy: Callable[[Planner, int], Choice | None], limit: int) -> int | None:
        """Ticks until all is done under ``policy``; None: not within ``limit`` ticks."""
        under_way: list[tuple[int, Choice] | None] = [None for _ in self.orders]
        for tick in range(limit + 1):
            for rank, going in enumerate(under_way):
                if going is not None and going[0] == tick:
                    self._do(rank, *going[1])
                    under_way[rank] = None
            if self.left == 0:
                return tick
            # All look at the same state: what begins in this tick shows in a later one.
            for rank, going in enumerate(under_way):
                choice = policy(self, rank) if going is None else None
                if choice is not None:
                    under_way[rank] = tick + TICKS[choice[0]], choice
        return None

    def _do(self, rank: int, kind: Kind, chunk: int) -> None:
        stage = self.stages[rank][chunk]
        if kind is Kind.FORWARD:
            trip = self.trips[self.forwards[stage]]
            self.forwards[stage] += 1
            self.kept[stage] += trip.grad
        elif kind in TAKES_GRADIENT:
            trip = self.graded[self.inputs[stage]]
            self.inputs[stage] += 1
            self.weights[stage] += kind is Kind.BACKWARD
        else:
            trip = self.graded[self.weights[stage]]
            self.weights[stage] += 1
        self.left -= TICKS[kind]
        self.orders[rank].append(trip.action(kind, chunk))


def forwards_only(step: Step) -> list[list[Action]]:
    """Orders of a step without gradients: whatever is ready, what is nearest to the end first."""
    trips = [Trip(p.name, m, p.grad) for m in range(step.microbatches) for p in step.passes]

    def policy(plan: Planner, rank: int) -> Choice | None:
        ready = (c for c, stage in enumerate(plan.stages[rank]) if plan.can_forward(stage))
        return max(((Kind.FORWARD, chunk) for chunk in ready), default=None)

    planner = Planner(step, trips)
    planner.run(policy, planner.enough)
    return planner.orders
