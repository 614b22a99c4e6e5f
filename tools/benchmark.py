#!/usr/bin/env python
"""Benchmarks on the CPU; each compares its sides within one call and prints ratios of medians.

step        memory and speed of a SOAR step against a plain loop on diffusers' own model
schedules   pipeline schedules with stages that sleep in place of computing: the executor against
            the simulator
pipeline    pipeline schedules on a real model, a core for each process, against the simulator fed
            with the measured costs
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from soar_mega.pipeline.schedules import SCHEDULES
from soar_mega.training.benchmark import Case, compare, hardware
from soar_mega.training.benchmark_pipeline import BASELINE, Measured, computing, ratios, sleeping


def main() -> None:
    args = make_parser().parse_args()
    if args.what != "step" and args.microbatches is None:
        args.microbatches = args.processes
    record = {"step": step, "schedules": schedules, "pipeline": pipeline}[args.what](args)
    record["command"] = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/benchmark.py step --repeats 5 --out result.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    def command(name: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        one.add_argument("--repeats", type=int, default=3, help="measurements of each side")
        one.add_argument("--out", type=Path, help="write the record as JSON")
        return one

    def case(one: argparse.ArgumentParser, *without: str) -> None:
        for field in fields(Case):
            if field.name in without:
                continue
            name = "--" + field.name.replace("_", "-")
            one.add_argument(name, type=int, default=field.default, help="of the measured case")

    def pipelined(one: argparse.ArgumentParser, ranks: int, names: tuple[str, ...]) -> None:
        one.add_argument("--processes", type=int, default=ranks, help="pipeline ranks P")
        one.add_argument("--microbatches", type=int, help="M (default: P)")
        one.add_argument(
            "--schedule",
            nargs="+",
            choices=SCHEDULES,
            default=list(names),
            help="beside sequential",
        )

    one = command("step")
    one.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    case(one)
    one = command("schedules")
    pipelined(one, 4, ("1f1b", "zero_bubble", "zero_bubble_v"))
    one.add_argument("--unit", type=float, default=0.02, help="seconds of a rank's forward")
    one = command("pipeline")
    pipelined(one, 2, ("1f1b", "zero_bubble"))
    case(one, "threads")
    return parser


def step(args: argparse.Namespace) -> dict[str, Any]:
    record = compare(case_of(args), args.repeats, args.steps, print)
    print(f"peak memory growth: {record['memory_ratio']:.2f} of the plain loop's")
    print(f"speed: {record['speedup']:.2f} times the plain loop's")
    return record


def schedules(args: argparse.Namespace) -> dict[str, Any]:
    names = list(dict.fromkeys([BASELINE, *args.schedule]))
    results = sleeping(names, args.processes, args.microbatches, args.unit, args.repeats)
    what = "pipeline schedules with sleeping stages: executor against simulator"
    return report(what, results, args, unit=args.unit)


def pipeline(args: argparse.Namespace) -> dict[str, Any]:
    names = list(dict.fromkeys([BASELINE, *args.schedule]))
    case = case_of(args, threads=1)
    results = computing(names, args.processes, args.microbatches, case, args.repeats)
    what = "pipeline schedules on a real model: executor against simulator with measured costs"
    return report(what, results, args, case=vars(case))


def case_of(args: argparse.Namespace, **fixed: int) -> Case:
    names = [field.name for field in fields(Case) if field.name not in fixed]
    return Case(**{name: getattr(args, name) for name in names}, **fixed)


def report(
    what: str, results: dict[str, Measured], args: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """Print the table; the record of it."""
    found = ratios(results)
    print(f"{'schedule':<18}{'median s':>9}  {'bubble':>7}  times as fast as {BASELINE}")
    print(f"{'':<36}  {'measured':>9}  {'simulated':>9}  {'difference':>10}")
    for name, result in results.items():
        measured, simulated = found[name]["measured"], found[name]["simulated"]
        print(
            f"{name:<18}{statistics.median(result.seconds):>9.3f}  {result.bubble:>7.2%}  "
            f"{measured:>9.3f}  {simulated:>9.3f}  {measured / simulated - 1:>10.2%}"
        )
    return {
        "what": what,
        "hardware": hardware(),
        "torch": torch.__version__,
        "processes": args.processes,
        "microbatches": args.microbatches,
        **more,
        "seconds": {name: result.seconds for name, result in results.items()},
        "bubble": {name: result.bubble for name, result in results.items()},
        "times_as_fast_as_sequential": found,
    }


if __name__ == "__main__":
    main()
