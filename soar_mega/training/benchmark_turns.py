"""Lets the sides of a benchmark take turns in this process."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Run(NamedTuple):
    """One pass of one side over all samples; ``cpu_seconds`` include its processes'."""

    seconds: float
    cpu_seconds: float


def alternate(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Run]]:
    """Every side once a round, forwards and backwards by turns; the first round is not counted."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            cpu, began = _cpu_seconds(), time.perf_counter()
            sides[name]()
            run = Run(time.perf_counter() - began, _cpu_seconds() - cpu)
            if repeat:
                runs[name].append(run)
    return runs


def summary(runs: dict[str, list[Run]], samples: int, baseline: str) -> dict[str, dict[str, float]]:
    """By side: medians of samples/s and CPU ms a sample, and speed in units of the baseline's."""
    seconds = {name: statistics.median(run.seconds for run in side) for name, side in runs.items()}
    return {
        name: {
            "samples_per_s": samples / seconds[name],
            "cpu_ms_per_sample": 1000 / samples * statistics.median(r.cpu_seconds for r in side),
            "times_as_fast": seconds[baseline] / seconds[name],
        }
        for name, side in runs.items()
    }


def _cpu_seconds() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(one) for one in who]
    return sum(one.ru_utime + one.ru_stime for one in used)
