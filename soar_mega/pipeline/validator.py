"""Refuses a schedule that drops or repeats work, breaks a dependency, deadlocks or keeps too much.

Every send is taken to block until its receive is posted, as NCCL's do: the lists are run under that
rule (rendezvous.py), whatever the backend at hand forgives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from soar_mega.pipeline.actions import COMPUTE, RELEASES, Action, Kind, Message, Schedule
from soar_mega.pipeline.rendezvous import ScheduleError
from soar_mega.pipeline.simulator import simulate


def problems(schedule: Schedule) -> list[str]:
    """What is wrong with a schedule, a sentence each; empty if nothing."""
    place = schedule.step.placement
    if len(schedule.actions) != place.ranks:
        return [f"{len(schedule.actions)} lists for {place.ranks} ranks"]
    found = [text for rank in range(place.ranks) for text in _unknown(schedule, rank)]
    if found:
        return found
    for rank in range(place.ranks):
        found += _wrong_work(schedule, rank)
        found += _wrong_order(schedule, rank)
        found += _wrong_messages(schedule, rank)
    try:
        timeline = simulate(schedule)
    except ScheduleError as error:
        return found + error.problems
    for rank, live in enumerate(timeline.peak_live if not found else ()):
        if live > schedule.live_bound:
            found.append(
                f"rank {rank} keeps {float(live):g} microbatches at a time, more than the bound of "
                f"{float(schedule.live_bound):g}"
            )
    return found


def validate(schedule: Schedule) -> None:
    """Check a schedule.

    Raises:
        ScheduleError: Names everything that is wrong; of a deadlock, which rank waits for what.
    """
    found = problems(schedule)
    if found:
        raise ScheduleError(schedule.name, found)


def _unknown(schedule: Schedule, rank: int) -> Iterator[str]:
    """Actions on what the step does not have."""
    step, ranks = schedule.step, schedule.step.placement.ranks
    for action in schedule.actions[rank]:
        travels = action.kind not in COMPUTE
        if (
            action.pass_name not in step.by_name
            or not 0 <= action.microbatch < step.microbatches
            or not 0 <= action.chunk < step.placement.chunks
            or travels != (action.channel is not None)
            or travels != (action.peer is not None and 0 <= action.peer < ranks)
        ):
            yield f"rank {rank}: {action!r} is on a pass, microbatch, chunk or peer there is not"


def _wrong_work(schedule: Schedule, rank: int) -> Iterator[str]:
    """Every forward once; every gradient once, whole or in its two halves."""
    step = schedule.step
    done = Counter(action for action in schedule.actions[rank] if action.kind in COMPUTE)
    for p in step.passes:
        for microbatch in range(step.microbatches):
            for chunk in range(step.placement.chunks):
                forward, whole, first, second = (
                    done.pop(Action(kind, p.name, microbatch, chunk), 0)
                    for kind in (
                        Kind.FORWARD,
                        Kind.BACKWARD,
                        Kind.INPUT_BACKWARD,
                        Kind.WEIGHT_BACKWARD,
                    )
                )
                what = f"{p.name} of microbatch {microbatch}, chunk {chunk}"
                if forward != 1:
                    yield f"rank {rank} does {forward} forwards of {what}"
                if (whole, first, second) not in ([(1, 0, 0), (0, 1, 1)] if p.grad else [(0,) * 3]):
                    yield (
                        f"rank {rank} does {whole} backwards, {first} input backwards and {second} "
                        f"weight backwards of {what}, which {'has a' if p.grad else 'is without'} "
                        "gradient"
                    )


def _wrong_order(schedule: Schedule, rank: int) -> Iterator[str]:
    """The first action; per chunk, what comes first, and weight gradients in their order.

    The weight gradient of a chunk's first pass with gradient is the chunk's first: Transformer
    Engine caches FP8 weights in that pass, and its weight gradient overwrites what is there.
    """
    step = schedule.step
    compute = [action for action in schedule.actions[rank] if action.kind in COMPUTE]
    first = Action(Kind.FORWARD, step.passes[0].name, 0)
    if compute and compute[0] != first:
        yield f"rank {rank} begins with {compute[0]}, not with {first}"
    for chunk in range(step.placement.chunks):
        own = [a for a in compute if a.chunk == chunk and step.by_name[a.pass_name].grad]
        made = [a for a in own if a.kind in RELEASES]
        if made and made[0] != replace(own[0], kind=made[0].kind):
            yield (
                f"rank {rank} begins the training passes of chunk {chunk} with {own[0]}, but its "
                f"first weight gradient is {made[0]}: it must be that pass's"
            )
        halves = [
            [(a.pass_name, a.microbatch) for a in compute if a.kind is kind and a.chunk == chunk]
            for kind in (Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD)
        ]
        if halves[0] != halves[1]:
            yield (
                f"rank {rank} does the weight backwards of chunk {chunk} in another order than its "
                "input backwards: they are a queue"
            )


def _wrong_messages(schedule: Schedule, rank: int) -> Iterator[str]:
    """Every message another rank needs is sent once, everything needed is received once."""
    step, place = schedule.step, schedule.step.placement
    sends: Counter[tuple[Message, int]] = Counter()
    receives: Counter[tuple[Message, int]] = Counter()
    for action in schedule.actions[rank]:
        if action.kind not in COMPUTE:
            assert action.peer is not None
            message = step.message(rank, action)
            (sends if action.kind is Kind.SEND else receives)[message, action.peer] += 1
    wanted_sends: set[tuple[Message, int]] = set()
    wanted_receives: set[tuple[Message, int]] = set()
    for p in step.passes:
        for microbatch in range(step.microbatches):
            for chunk in range(place.chunks):
                for kind in (Kind.FORWARD, Kind.BACKWARD) if p.grad else (Kind.FORWARD,):
                    action = Action(kind, p.name, microbatch, chunk)
                    made, need = step.makes(rank, action), step.needs(rank, action)
                    if made and place.rank(step.target(made)) != rank:
                        wanted_sends.add((made, place.rank(step.target(made))))
                    if need and place.rank(need.source_stage) != rank:
                        wanted_receives.add((need, place.rank(need.source_stage)))
    if step.awaited and place.rank(place.last_stage) == rank and rank != 0:
        wanted_sends |= {(step.hand_over(m), 0) for m in range(step.microbatches)}
    for what, seen, wanted in (
        ("sends", sends, wanted_sends),
        ("receives", receives, wanted_receives),
    ):
        for key in sorted(seen.keys() | wanted, key=repr):
            if seen[key] != (key in wanted):
                message, peer = key
                yield (
                    f"rank {rank} {what} the {message.channel} of {message.pass_name}, microbatch "
                    f"{message.microbatch}, stage {message.source_stage} {seen[key]} times "
                    f"{'to' if what == 'sends' else 'from'} rank {peer}, not {int(key in wanted)}"
                )
