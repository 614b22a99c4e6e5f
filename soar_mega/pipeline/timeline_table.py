"""A timeline's numbers as text and as JSON-ready data, beside the bounds of its schedule."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from soar_mega.pipeline.actions import Schedule
from soar_mega.pipeline.schedules_bounds import lower_bound
from soar_mega.pipeline.timeline import Timeline


def summary(timeline: Timeline, schedule: Schedule) -> dict[str, Any]:
    """The timeline's numbers and the schedule's bounds.

    ``lower_bound`` is the least makespan at unit costs of any such schedule, ``live_bound`` the
    most microbatches a rank may keep activations of.
    """
    return {
        **timeline.summary(),
        "lower_bound": _number(lower_bound(schedule.name, schedule.step)),
        "live_bound": _number(schedule.live_bound),
    }


def table(timeline: Timeline, schedule: Schedule) -> str:
    """The same for people: a line on the whole, then a line a rank."""
    bound = f"{float(schedule.live_bound):g}"
    lines = [
        f"{schedule.name}: makespan {timeline.makespan:.6g} {timeline.unit}, work "
        f"{timeline.work:.6g}, bubble {timeline.bubble:.2%} (no such schedule takes less than "
        f"{float(lower_bound(schedule.name, schedule.step)):.6g} at unit costs)",
        "",
        f"{'rank':>4}  {'busy':>9}  {'bubble':>7}  {'peak live':>9}  {'at most':>7}  "
        f"{'receive buffers':>15}",
    ]
    for rank in timeline.ranks:
        lines.append(
            f"{rank:>4}  {timeline.busy[rank]:>9.6g}  {timeline.rank_bubbles[rank]:>7.2%}  "
            f"{float(timeline.peak_live[rank]):>9.4g}  {bound:>7}  "
            f"{timeline.receive_buffers[rank]:>15}"
        )
    return "\n".join(lines)


def _number(number: Fraction) -> float | int:
    return number.numerator if number.denominator == 1 else float(number)
