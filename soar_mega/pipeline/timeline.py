"""What happened when: the actions of a step with their times, simulated or recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from soar_mega.passes import Pass
from soar_mega.pipeline.actions import COMPUTE, RELEASES, Action, Channel, Kind, Placement, Step


@dataclass(frozen=True, slots=True)
class Event:
    """An action and its times, in the timeline's unit. A SEND lasts while it waits for its peer."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step as it went.

    Attributes:
        name: The schedule's name.
        step: What was done.
        events: Per rank, in the order they were begun.
        unit: Of the times: ``units`` of the cost model, or ``s``.
    """

    name: str
    step: Step
    events: tuple[tuple[Event, ...], ...]
    unit: str = "units"

    def compute(self, rank: int) -> Iterator[Event]:
        """The rank's forwards and backwards."""
        return (event for event in self.events[rank] if event.action.kind in COMPUTE)

    @cached_property
    def makespan(self) -> float:
        """From the first compute action of any rank to the end of the last."""
        return self._end - self.start

    @cached_property
    def start(self) -> float:
        """When the first compute action of any rank begins."""
        return min(e.start for rank in self.ranks for e in self.compute(rank))

    @cached_property
    def _end(self) -> float:
        return max(e.end for rank in self.ranks for e in self.compute(rank))

    @property
    def ranks(self) -> range:
        return range(len(self.events))

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Time each rank computes."""
        return tuple(sum(e.end - e.start for e in self.compute(rank)) for rank in self.ranks)

    @property
    def work(self) -> float:
        """Time a rank computes, the mean over ranks."""
        return sum(self.busy) / len(self.busy)

    @property
    def bubble(self) -> float:
        """1 - work / makespan: the share of the ranks' time in which they do not compute."""
        return 1 - self.work / self.makespan

    @cached_property
    def rank_bubbles(self) -> tuple[float, ...]:
        """1 - busy / makespan of each rank."""
        return tuple(1 - busy / self.makespan for busy in self.busy)

    @cached_property
    def peak_live(self) -> tuple[Fraction, ...]:
        """Most microbatches a rank keeps activations of at a time.

        A pass with gradient counts from the start of its forward to the end of its weight gradient,
        as many microbatches as it has states, 1 / v of it for each of the rank's v chunks.
        """
        by_name, peaks = self.step.by_name, []
        for rank in self.ranks:
            live = peak = 0
            for event in self.compute(rank):
                p = by_name[event.action.pass_name]
                if event.action.kind is Kind.FORWARD and p.grad:
                    live += p.states
                    peak = max(peak, live)
                elif event.action.kind in RELEASES:
                    live -= p.states
            peaks.append(Fraction(peak, self.step.placement.chunks))
        return tuple(peaks)

    @cached_property
    def receive_buffers(self) -> tuple[int, ...]:
        """Most receives a rank has posted at a time whose data its compute has not taken yet."""
        peaks = []
        for rank in self.ranks:
            held = peak = 0
            for event in self.events[rank]:
                if event.action.kind is Kind.RECEIVE:
                    held += 1
                    peak = max(peak, held)
                elif event.action.kind in COMPUTE:
                    need = self.step.needs(rank, event.action)
                    if need and self.step.placement.rank(need.source_stage) != rank:
                        # One hand-over serves every pass of its microbatch.
                        held -= need.channel is not Channel.HAND_OVER or event.action.pass_name == (
                            next(p.name for p in self.step.passes if p.after)
                        )
            peaks.append(peak)
        return tuple(peaks)

    def summary(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {
            "schedule": self.name,
            "pipeline": len(self.events),
            "virtual_stages": self.step.placement.chunks,
            "microbatches": self.step.microbatches,
            "unit": self.unit,
            "makespan": _plain(self.makespan),
            "work": _plain(self.work),
            "bubble": _plain(self.bubble),
            "rank_bubble": [_plain(bubble) for bubble in self.rank_bubbles],
            "peak_live_microbatches": [_plain(live) for live in self.peak_live],
            "peak_receive_buffers": list(self.receive_buffers),
        }

    def save(self, path: Path) -> None:
        """Write the timeline as JSON, for ``load``."""
        place = self.step.placement
        rows = [
            [
                [a.kind, a.pass_name, a.microbatch, a.chunk, a.channel, a.peer, e.start, e.end]
                for e in events
                for a in [e.action]
            ]
            for events in self.events
        ]
        body = {
            "name": self.name,
            "unit": self.unit,
            "microbatches": self.step.microbatches,
            "placement": [place.ranks, place.chunks, place.folded],
            "passes": [
                [p.name, p.kind, p.grad, list(p.after), p.states, p.first] for p in self.step.passes
            ],
            "events": rows,
        }
        path.write_text(json.dumps(body))

    @classmethod
    def load(cls, path: Path) -> Timeline:
        """Read what ``save`` wrote.

        Raises:
            ValueError: It is something else.
        """
        body = json.loads(path.read_text())
        if not isinstance(body, dict) or "events" not in body or "passes" not in body:
            raise ValueError(f"{path} is no recorded timeline: give a run's timeline/step_<n>.json")
        passes = tuple(
            Pass(name, kind, grad, tuple(after), states, first)
            for name, kind, grad, after, states, first in body["passes"]
        )
        step = Step(Placement(*body["placement"]), passes, body["microbatches"])
        events = tuple(
            tuple(
                Event(Action(Kind(k), name, m, c, Channel(ch) if ch else None, peer), start, end)
                for k, name, m, c, ch, peer, start, end in rows
            )
            for rows in body["events"]
        )
        return cls(body["name"], step, events, body["unit"])


def _plain(number: float | Fraction) -> float | int:
    """Without the crumbs of adding thirds, whole numbers as such."""
    short = float(f"{float(number):.12g}")
    return int(short) if short == int(short) else short
