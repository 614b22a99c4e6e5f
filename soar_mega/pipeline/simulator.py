"""Runs a schedule against a cost model: when every action starts and ends."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from soar_mega.pipeline.actions import Action, Kind, Schedule, Step
from soar_mega.pipeline.rendezvous import Rendezvous
from soar_mega.pipeline.timeline import Timeline


@dataclass(frozen=True)
class Costs:
    """How long actions take, in one unit of the caller's choice.

    Attributes:
        forward: Of one state of one microbatch through a whole rank's share of the model.
        input_backward: The same of the input gradients.
        weight_backward: The same of the weight gradients. BACKWARD takes the sum of both.
        stage_share: How much of a rank's mean share each stage is; default 1 / v each.
        measured: Durations of one state that replace all this, by (kind, pass kind, stage).
        latency: From a send to the arrival.
        unit: Name of the unit.
    """

    forward: float = 1.0
    input_backward: float = 1.0
    weight_backward: float = 1.0
    stage_share: tuple[float, ...] | None = None
    measured: Mapping[tuple[Kind, str, int], float] = field(default_factory=dict)
    latency: float = 0.0
    unit: str = "units"

    @classmethod
    def of(cls, timelines: Iterable[Timeline]) -> Costs:
        """What the compute actions of recorded steps took a state: of each sort the median."""
        found: dict[tuple[Kind, str, int], list[float]] = defaultdict(list)
        for line in timelines:
            for rank in line.ranks:
                for event in line.compute(rank):
                    stage = line.step.placement.stage(rank, event.action.chunk)
                    p = line.step.by_name[event.action.pass_name]
                    seconds = (event.end - event.start) / p.states
                    found[event.action.kind, p.kind, stage].append(seconds)
        medians = {sort: statistics.median(times) for sort, times in found.items()}
        return cls(measured=medians, unit="s")

    def duration(self, step: Step, rank: int, action: Action) -> float:
        """Time of a compute action.

        Raises:
            ValueError: ``stage_share`` has not one entry per stage, or ``measured`` lacks one.
        """
        stage, p = step.placement.stage(rank, action.chunk), step.by_name[action.pass_name]
        measured = self.measured.get((action.kind, p.kind, stage))
        if measured is not None:
            return measured * p.states
        if self.measured:
            raise ValueError(
                f"there is no measured time of a {action.kind.replace('_', ' ')} of {p.kind} on "
                f"stage {stage}: costs must be of a schedule with the same kinds of backward"
            )
        base = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.input_backward + self.weight_backward,
            Kind.INPUT_BACKWARD: self.input_backward,
            Kind.WEIGHT_BACKWARD: self.weight_backward,
        }[action.kind]
        if self.stage_share is None:
            return base * p.states / step.placement.chunks
        if len(self.stage_share) != step.placement.stages:
            raise ValueError(
                f"stage_share has {len(self.stage_share)} entries for {step.placement.stages} "
                "stages: give one each, in the order a microbatch visits them"
            )
        return base * p.states * self.stage_share[stage]


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """The timeline of a schedule.

    Args:
        schedule: What to run.
        costs: Default: forward 1, input and weight gradient 1 each, no latency.

    Raises:
        ScheduleError: The schedule deadlocks or a send meets the wrong receive.
    """
    costs, step = costs or Costs(), schedule.step
    run = Rendezvous(schedule, lambda rank, act: costs.duration(step, rank, act), costs.latency)
    events = tuple(tuple(rank_events) for rank_events in run.run())
    return Timeline(schedule.name, step, events, costs.unit)
