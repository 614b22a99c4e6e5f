"""Runs the action lists of all ranks against each other, with the rules every backend must bear.

A compute action starts once its rank is free and its inputs are there. A SEND holds its rank until
the matching receive is posted; on a link the n-th send meets the n-th receive. Nothing here depends
on how long actions take but the times: if the lists end with one set of durations, they end with
any, so running them once proves that they cannot deadlock.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from soar_mega.pipeline.actions import (
    TAKES_GRADIENT,
    Action,
    Channel,
    Kind,
    Message,
    Schedule,
)
from soar_mega.pipeline.timeline import Event

Link = tuple[Channel, int, int]
Duration = Callable[[int, Action], float]


class ScheduleError(ValueError):
    """A schedule that must not run.

    Attributes:
        problems: What is wrong with it, a sentence each.
    """

    def __init__(self, name: str, problems: list[str]) -> None:
        self.problems = problems
        more = len(problems) - 8
        lines = problems[:8] + ([f"and {more} more"] if more > 0 else [])
        super().__init__(f"the schedule {name} is wrong:\n  " + "\n  ".join(lines))


class Rendezvous:
    """One run of a schedule's lists.

    Args:
        schedule: What to run.
        duration: Time of a compute action of a rank.
        latency: Time from a send to the arrival.
    """

    def __init__(self, schedule: Schedule, duration: Duration, latency: float = 0.0) -> None:
        self.schedule, self.step = schedule, schedule.step
        self.duration, self.latency = duration, latency
        ranks = len(schedule.actions)
        self.position = [0] * ranks
        self.clock = [0.0] * ranks
        self.events: list[list[Event]] = [[] for _ in range(ranks)]
        # When each output was made, on the rank that made it; when each arrived.
        self.made: dict[Message, float] = {}
        self.arrived: dict[Message, float] = {}
        self.done: list[set[Action]] = [set() for _ in range(ranks)]
        self.left_last: dict[int, set[str]] = defaultdict(set)
        self.posted: dict[Link, deque[tuple[Message, float]]] = defaultdict(deque)
        self.waiting = deque(range(ranks))

    def run(self) -> list[list[Event]]:
        """The events of each rank.

        Raises:
            ScheduleError: The lists come to a stand; says which rank waits for what. Or a send
                meets the receive of something else.
        """
        while self.waiting:
            rank = self.waiting.popleft()
            actions = self.schedule.actions[rank]
            while self.position[rank] < len(actions):
                action = actions[self.position[rank]]
                if not self._try(rank, action):
                    break
                self.position[rank] += 1
                # Only messages can set another rank free, and only their two ends.
                if action.peer is not None:
                    self.wake(action.peer)
        stuck = [
            f"rank {rank} at {actions[at]} waits for {self._reason(rank, actions[at])}"
            for rank, (actions, at) in enumerate(
                zip(self.schedule.actions, self.position, strict=True)
            )
            if at < len(actions)
        ]
        if stuck:
            raise ScheduleError(self.schedule.name, ["deadlock", *stuck])
        return self.events

    def wake(self, rank: int) -> None:
        """Look at a rank again."""
        if rank not in self.waiting:
            self.waiting.append(rank)

    def _try(self, rank: int, action: Action) -> bool:
        now = self.clock[rank]
        if action.kind is Kind.RECEIVE:
            assert action.channel is not None and action.peer is not None
            link = (action.channel, action.peer, rank)
            self.posted[link].append((self.step.message(rank, action), now))
            self.events[rank].append(Event(action, now, now))
            return True
        ready = self._send(rank, action) if action.kind is Kind.SEND else self._inputs(rank, action)
        if ready is None:
            return False
        start, end = now, max(now, ready)
        if action.kind is not Kind.SEND:
            start, end = end, end + self.duration(rank, action)
            self._finish(rank, action, end)
        self.clock[rank] = end
        self.events[rank].append(Event(action, start, end))
        return True

    def _send(self, rank: int, action: Action) -> float | None:
        """When the send gets through; None: not yet."""
        assert action.channel is not None and action.peer is not None
        message = self.step.message(rank, action)
        posted = self.posted[action.channel, rank, action.peer]
        if message not in self.made or not posted:
            return None
        expected, since = posted[0]
        if expected != message:
            raise ScheduleError(
                self.schedule.name,
                [f"rank {rank} does {action}, where rank {action.peer} expects {expected}"],
            )
        posted.popleft()
        through = max(self.clock[rank], since)
        self.arrived[message] = through + self.latency
        return through

    def _inputs(self, rank: int, action: Action) -> float | None:
        """When the last input of a compute action is there; None: not yet."""
        before = self._before(action)
        if before is not None and before not in self.done[rank]:
            return None
        need = self.step.needs(rank, action)
        return 0.0 if need is None else self._source(rank, need).get(need)

    def _source(self, rank: int, need: Message) -> dict[Message, float]:
        local = self.step.placement.rank(need.source_stage) == rank
        return self.made if local else self.arrived

    @staticmethod
    def _before(action: Action) -> Action | None:
        """What the rank itself must have done on the same chunk."""
        kind = {
            Kind.BACKWARD: Kind.FORWARD,
            Kind.INPUT_BACKWARD: Kind.FORWARD,
            Kind.WEIGHT_BACKWARD: Kind.INPUT_BACKWARD,
        }.get(action.kind)
        if kind is None:
            return None
        return Action(kind, action.pass_name, action.microbatch, action.chunk)

    def _finish(self, rank: int, action: Action, end: float) -> None:
        self.done[rank].add(action)
        made = self.step.makes(rank, action)
        if made is not None:
            self.made[made] = end
        elif action.kind is Kind.FORWARD and action.pass_name in self.step.awaited:
            left = self.left_last[action.microbatch]
            left.add(action.pass_name)
            if len(left) == len(self.step.awaited):
                self.made[self.step.hand_over(action.microbatch)] = end

    def _reason(self, rank: int, action: Action) -> str:
        if action.kind is Kind.SEND:
            if self.step.message(rank, action) not in self.made:
                return "its own output, which is not made yet"
            return f"rank {action.peer} to post the receive"
        before = self._before(action)
        if before is not None and before not in self.done[rank]:
            return f"its own {before}"
        need = self.step.needs(rank, action)
        assert need is not None
        what = "gradient" if action.kind in TAKES_GRADIENT else need.channel.value
        source = self.step.placement.rank(need.source_stage)
        return f"the {what} of stage {need.source_stage} (rank {source})"
