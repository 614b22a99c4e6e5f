"""All sides in turn, and the record of what was found."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from soar_mega.telemetry.flops import model_flops_utilisation
from soar_mega.training.benchmark_step.load import Load
from soar_mega.training.benchmark_step.measure import Failure, Measured, Runner
from soar_mega.training.benchmark_step.variants import REFERENCES, Variant

PUBLISHED, PLAIN = REFERENCES


@dataclass(frozen=True)
class Plan:
    """What is measured how often.

    Attributes:
        loads: One after the other.
        variants: Of our side and of the reference; a table for each microbatch among them.
        micro_batches: For variants that name none; empty: each load's own.
        with_reference: Whether both references are measured at every microbatch.
        repeats: Measurements of each variant; they take turns, each round in the other direction.
        steps, warmup: Of one measurement: timed, and before those.
    """

    loads: tuple[Load, ...]
    variants: tuple[Variant, ...]
    micro_batches: tuple[int, ...] = ()
    with_reference: bool = True
    repeats: int = 3
    steps: int = 3
    warmup: int = 2

    def sides(self, load: Load) -> list[Variant]:
        """Every variant of a load with its microbatch, the references of a microbatch first."""
        sizes = self.micro_batches or (load.default_micro_batch(),)
        wanted = [
            replace(variant, micro_batch_size=size)
            for variant in self.variants
            for size in ([variant.micro_batch_size] if variant.micro_batch_size else sizes)
            # Flow matching has no auxiliary states to group.
            if load.objective == "soar" or variant.aux_group_size == 1
        ]
        found: list[Variant] = []
        for size in dict.fromkeys(variant.micro_batch_size for variant in wanted):
            if self.with_reference:
                found += [replace(one, micro_batch_size=size) for one in REFERENCES]
            found += [variant for variant in wanted if variant.micro_batch_size == size]
        return list(dict.fromkeys(found))


# Of each variant what was measured, and why no more where it failed.
Found = dict[Variant, "list[Measured] | Failure"]


def compare(
    plan: Plan,
    run: Runner,
    *,
    peak_tflops: float | None,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure everything that is planned. A variant that fails is not tried again.

    Args:
        plan: What.
        run: Measures one side once.
        peak_tflops: Of the device, for MFU; None: unknown.
        say: Gets a line after each measurement.
        keep: Gets the tables so far after each measurement.

    Returns:
        Tables, see ``table_of``.
    """
    done: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    began = time.perf_counter()
    for load in plan.loads:
        sides = plan.sides(load)
        found: Found = {variant: [] for variant in sides}
        for repeat in range(plan.repeats):
            for variant in sides if repeat % 2 == 0 else reversed(sides):
                runs = found[variant]
                if isinstance(runs, Failure):
                    continue
                outcome = run(load, variant, plan.steps, plan.warmup)
                if isinstance(outcome, Failure):
                    found[variant] = outcome
                else:
                    runs.append(outcome)
                say(f"{time.perf_counter() - began:6.0f} s  {_line(load, variant, outcome)}")
                tables = [*done, *_tables(load, found, peak_tflops)]
                keep(tables)
        done = tables
    return done


def _line(load: Load, variant: Variant, outcome: Measured | Failure) -> str:
    name = f"{load.name} {load.objective} x {variant.micro_batch_size}, {variant.label}: "
    if isinstance(outcome, Failure):
        return name + f"failed: {outcome.reason}"
    second = statistics.median(outcome.seconds)
    return (
        f"{name}{second:.3f} s a step, +{outcome.peak_growth_bytes / 2**30:.2f} GiB "
        f"(ready after {outcome.ready_seconds:.0f} s)"
    )


def _tables(load: Load, found: Found, peak_tflops: float | None) -> list[dict[str, Any]]:
    sizes = dict.fromkeys(variant.micro_batch_size for variant in found)
    return [
        table_of(
            load, {v: runs for v, runs in found.items() if v.micro_batch_size == size}, peak_tflops
        )
        for size in sizes
    ]


def table_of(load: Load, found: Found, peak_tflops: float | None) -> dict[str, Any]:
    """The record of a load at one microbatch.

    Args:
        load: What was computed.
        found: Of each variant, all of one microbatch.
        peak_tflops: Of the device, for MFU; None: unknown.

    Returns:
        ``load`` and sizes; ``forward_tflop`` of a sample; ``sides``: for each variant ``factor``
        (k), ``runs`` or ``failed``, medians, and ``ratios`` to the reference as published and to
        the one that recomputes as much (``speed`` above 1 is faster, ``memory`` below 1 is less).
    """
    (size,) = {variant.micro_batch_size for variant in found}
    references = {
        "as published": replace(PUBLISHED, micro_batch_size=size),
        "same recomputation": replace(PLAIN, micro_batch_size=size),
    }
    sides = []
    medians = {
        variant: _medians(load, variant, runs, peak_tflops)
        for variant, runs in found.items()
        if not isinstance(runs, Failure) and runs
    }
    for variant, runs in found.items():
        side: dict[str, Any] = {
            "label": variant.label,
            "variant": asdict(variant),
            "factor": load.factor(variant),
        }
        if isinstance(runs, Failure):
            side["failed"] = runs.reason
        elif runs:
            side |= {"runs": [asdict(run) for run in runs], "median": medians[variant]}
            side["ratios"] = {}
            for name, reference in references.items():
                if name == "same recomputation":
                    mode = variant.activation_checkpointing
                    reference = replace(reference, activation_checkpointing=mode)
                if variant.side == "ours" and reference in medians:
                    side["ratios"][name] = _ratios(medians[variant], medians[reference])
        sides.append(side)
    return {
        "load": asdict(load),
        "micro_batch_size": size,
        "parameters": load.parameters(),
        "forward_tflop": load.forward_flops() / 1e12,
        "peak_tflops": peak_tflops,
        "sides": sides,
    }


def _medians(
    load: Load, variant: Variant, runs: Sequence[Measured], peak_tflops: float | None
) -> dict[str, float | None]:
    second = statistics.median(statistics.median(run.seconds) for run in runs)
    samples = variant.micro_batch_size / second
    flops = load.factor(variant) * load.forward_flops()
    growth = statistics.median(run.peak_growth_bytes for run in runs)
    mfu = None
    if peak_tflops is not None:
        mfu = model_flops_utilisation(samples, flops, 1, peak_tflops)
    return {
        "seconds": second,
        "samples_per_s": samples,
        "model_tflops": samples * flops / 1e12,
        "mfu": mfu,
        "peak_growth_bytes": growth,
        "total_peak_bytes": growth + statistics.median(run.held_bytes for run in runs),
    }


def _ratios(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, float | None]:
    memory = reference["peak_growth_bytes"]
    return {
        "speed": ours["samples_per_s"] / reference["samples_per_s"],
        "memory": ours["peak_growth_bytes"] / memory if memory else None,
    }
