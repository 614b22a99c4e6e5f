"""Puts the messages into lists of compute actions, so that no send ever has to wait.

The lists are timed with equal costs and instant messages. A SEND follows the action that makes what
it sends. Its RECEIVE is posted by the time of that send, and ``EARLY`` compute actions before, for
the differences between the plan and real durations; on a link in the order of the sends. Where a
receive and a send stand between the same two compute actions the receive comes first. Played at the
planned times no send waits, hence no deadlock, hence none with any other durations (rendezvous.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

from soar_mega.pipeline.actions import (
    Action,
    Channel,
    Kind,
    Message,
    Schedule,
    Step,
)
from soar_mega.pipeline.rendezvous import Rendezvous

EARLY = 2


class _Plan(Rendezvous):
    """A run in which every output is everywhere at once and needs no message."""

    def __init__(self, bare: Schedule, flush: bool) -> None:
        super().__init__(bare, lambda _, a: 2.0 if a.kind is Kind.BACKWARD else 1.0)
        self.held = flush

    def _source(self, rank: int, need: Message) -> dict[Message, float]:
        return {} if self.held and need.channel is Channel.HAND_OVER else self.made

    def _finish(self, rank: int, action: Action, end: float) -> None:
        super()._finish(rank, action, end)
        made = self.step.makes(rank, action)
        if made is not None:
            self.wake(self.step.placement.rank(self.step.target(made)))
        elif action.kind is Kind.FORWARD and action.pass_name in self.step.awaited:
            out = [self.step.hand_over(m) for m in range(self.step.microbatches)]
            if self.held and all(message in self.made for message in out):
                self.held = False
                self.made.update(dict.fromkeys(out, end))
            self.wake(0)


def link(step: Step, orders: Sequence[Sequence[Action]], *, flush: bool) -> list[list[Action]]:
    """Compute lists with the messages they need.

    Args:
        step: What the lists do.
        orders: Compute actions of each rank.
        flush: Hold all hand-overs back until the last pass they wait for has left the last stage.

    Raises:
        ScheduleError: The compute actions wait for each other in a circle.
    """
    bare = Schedule("plan", step, tuple(tuple(order) for order in orders), Fraction(0))
    events = _Plan(bare, flush).run()
    ends = [[event.end for event in rank_events] for rank_events in events]
    # What each rank does before its compute action number k (k = len: at the end).
    posts: list[dict[int, list[Action]]] = [defaultdict(list) for _ in orders]
    sends: list[dict[int, list[Action]]] = [defaultdict(list) for _ in orders]
    place = step.placement
    for rank, order in enumerate(orders):
        for at, message in _outgoing(step, rank, order, flush):
            target = step.target(message)
            peer = place.rank(target)
            if peer == rank:
                continue
            source, chunk = place.chunk(message.source_stage), place.chunk(target)
            name, microbatch, channel = message.pass_name, message.microbatch, message.channel
            sends[rank][at + 1].append(Action(Kind.SEND, name, microbatch, source, channel, peer))
            # The last gap that the peer reaches by the time of the send.
            gap = max(0, bisect_right(ends[peer], ends[rank][at]) - EARLY)
            posts[peer][gap].append(Action(Kind.RECEIVE, name, microbatch, chunk, channel, rank))
    return [
        [
            action
            for at in range(len(order) + 1)
            for action in (*posts[rank][at], *sends[rank][at], *order[at : at + 1])
        ]
        for rank, order in enumerate(orders)
    ]


def _outgoing(
    step: Step, rank: int, order: Sequence[Action], flush: bool
) -> list[tuple[int, Message]]:
    """Everything a rank gives to other stages: after which compute action, and what."""
    found: list[tuple[int, Message]] = []
    left: dict[int, int] = defaultdict(int)
    hand_overs: list[tuple[int, Message]] = []
    for at, action in enumerate(order):
        made = step.makes(rank, action)
        if made is not None:
            found.append((at, made))
        elif action.kind is Kind.FORWARD and action.pass_name in step.awaited:
            left[action.microbatch] += 1
            if left[action.microbatch] == len(step.awaited):
                hand_overs.append((at, step.hand_over(action.microbatch)))
    if flush and hand_overs:
        last = hand_overs[-1][0]
        hand_overs = [(last, message) for _, message in hand_overs]
    return found + hand_overs
