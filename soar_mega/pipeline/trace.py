"""Writes timelines as a trace for Perfetto and Chrome (the Trace Event Format's JSON)."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soar_mega.pipeline.actions import COMPUTE, RELEASES, Channel, Kind, Message
from soar_mega.pipeline.timeline import Timeline


def write_trace(path: Path, timelines: Sequence[Timeline]) -> None:
    """Write timelines side by side, a process each and a thread a rank, with arrows for messages.

    Simulated units are shown as milliseconds. Opens in ui.perfetto.dev and chrome://tracing.
    """
    events = [event for process, line in enumerate(timelines) for event in _process(process, line)]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _process(process: int, line: Timeline) -> list[dict[str, Any]]:
    factor = 1e6 if line.unit == "s" else 1e3  # to microseconds
    out: list[dict[str, Any]] = [_named("process_name", process, 0, line.name)]
    sent: dict[Message, deque[int]] = defaultdict(deque)
    flow = process << 32
    for rank in line.ranks:
        out.append(_named("thread_name", process, rank, f"rank {rank}"))
        live = 0.0
        for event in line.events[rank]:
            action = event.action
            p = line.step.by_name[action.pass_name]
            where = {"pid": process, "tid": rank}
            start, end = ((t - line.start) * factor for t in (event.start, event.end))
            if action.kind in COMPUTE:
                out.append(
                    {
                        "name": f"{action.pass_name} {action.kind.replace('_', ' ')}",
                        "cat": f"{p.kind},{action.kind}",
                        "ph": "X",
                        "ts": start,
                        "dur": end - start,
                        "args": {"microbatch": action.microbatch, "chunk": action.chunk},
                        **where,
                    }
                )
                if p.grad and action.kind is Kind.FORWARD:
                    live += p.states / line.step.placement.chunks
                    out.append(_live(process, rank, start, live))
                elif action.kind in RELEASES:
                    live -= p.states / line.step.placement.chunks
                    out.append(_live(process, rank, end, live))
            elif action.kind is Kind.SEND:
                flow += 1
                sent[line.step.message(rank, action)].append(flow)
                # A breath earlier, to be within the slice of the action that made it.
                arrow = {"ph": "s", "id": flow, "ts": max(0.0, start - 1e-3)}
                out.append({**arrow, **where, **_arrow(action.channel)})
    for rank in line.ranks:
        for event in line.events[rank]:
            need = line.step.needs(rank, event.action) if event.action.kind in COMPUTE else None
            if need is not None and sent[need]:
                start = (event.start - line.start) * factor
                arrow = {"ph": "f", "bp": "e", "id": sent[need].popleft(), "ts": start}
                out.append({**arrow, "pid": process, "tid": rank, **_arrow(need.channel)})
    return out


def _arrow(channel: Channel | None) -> dict[str, str]:
    return {"name": str(channel), "cat": "message"}


def _live(process: int, rank: int, time: float, live: float) -> dict[str, Any]:
    name = f"live microbatches, rank {rank}"
    return {"name": name, "ph": "C", "pid": process, "ts": time, "args": {"live": live}}


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
