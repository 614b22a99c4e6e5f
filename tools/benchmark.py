#!/usr/bin/env python
"""Benchmarks on the CPU; each compares its sides within one call and prints ratios of medians.

step        memory and speed of a SOAR step against a plain loop on diffusers' own model
schedules   pipeline schedules with stages that sleep in place of computing: the executor against
            the simulator
pipeline    pipeline schedules on a real model, a core for each process, against the simulator fed
            with the measured costs
data        how fast pictures, and encoded samples, become batches: ours, plain webdataset, a
            DataLoader over files, bare reads; and what resuming costs
checkpoint  how long training stands still for a save, in the background and not; reading it back
convert     a real-size transformer to a checkpoint of ours and back, against cp and sync
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from soar_mega.pipeline.schedules import SCHEDULES
from soar_mega.training.benchmark import Case, compare, hardware
from soar_mega.training.benchmark_checkpoint import StateCase, measure_checkpoints
from soar_mega.training.benchmark_convert import measure_converters
from soar_mega.training.benchmark_data import PictureCase, measure_order, measure_pictures
from soar_mega.training.benchmark_encoded import EncodedCase, measure_encoded
from soar_mega.training.benchmark_pipeline import BASELINE, Measured, computing, ratios, sleeping


def main() -> None:
    args = make_parser().parse_args()
    if args.what in ("schedules", "pipeline") and args.microbatches is None:
        args.microbatches = args.processes
    commands = {
        "step": step,
        "schedules": schedules,
        "pipeline": pipeline,
        "data": data,
        "checkpoint": checkpoint,
        "convert": convert,
    }
    record = commands[args.what](args)
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
    one = command("data")
    whole = PictureCase()
    one.add_argument("--pictures", type=int, default=whole.pictures, help="of each size")
    one.add_argument(
        "--sizes",
        nargs="+",
        type=size_of,
        default=[(512, 512), (1632, 1224)],
        metavar="WIDTHxHEIGHT",
        help="of the sources, in pixels",
    )
    one.add_argument("--resolution", type=int, default=whole.resolution, help="of the result")
    one.add_argument("--batch", type=int, default=whole.batch, help="pictures a batch")
    one.add_argument(
        "--workers", type=int, default=0, help="threads of ours, processes of the others; 0: none"
    )
    one.add_argument("--samples", type=int, default=EncodedCase().samples, help="encoded ones")
    one.add_argument(
        "--order-samples", type=int, default=2_000_000, help="of the epoch that is resumed"
    )
    one = command("checkpoint")
    state = StateCase()
    one.add_argument(
        "--million-parameters", type=int, default=state.million_parameters, help="of the state"
    )
    one.add_argument("--folder", type=Path, help="on the disk to measure; it must not exist")
    one = command("convert")
    one.add_argument(
        "--architecture",
        type=Path,
        default=Path("configs/architectures/sd35_medium"),
        help="folder with transformer/config.json",
    )
    one.add_argument("--folder", type=Path, help="on the disk to measure; it must not exist")
    return parser


def size_of(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


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


def data(args: argparse.Namespace) -> dict[str, Any]:
    pictures = PictureCase(args.pictures, args.batch, args.resolution, args.workers)
    encoded = EncodedCase(args.samples, threads=args.workers or 1)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": "samples into batches: this project, plain webdataset, a DataLoader over files",
        "hardware": hardware(),
        "torch": torch.__version__,
        "case": vars(pictures),
        "encoded_case": vars(encoded),
        "pictures": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for width, height in args.sizes:
            name = f"{width}x{height}"
            found = measure_pictures(pictures, (width, height), args.repeats, Path(folder, name))
            record["pictures"][name] = found
            show(f"{name} to {args.resolution} px", found["median"], "plain webdataset")
            for side, core in found["per_core"].items():
                times = f"{core['times_one_core_of_pil']:.2f} times one core of ours with PIL"
                print(f"  {side}: {core['pictures_per_s']:.1f} pictures/s of a CPU core, {times}")
        record["encoded"] = measure_encoded(encoded, args.repeats, Path(folder, "encoded"))
        show("encoded samples", record["encoded"]["median"], "a bare read, new buffers")
        for buffer, part in record["encoded"]["ours_of_bare_read"].items():
            print(f"  ours into {buffer}: {part:.2f} of a bare read into the same")
    record["order"] = measure_order(args.order_samples, 200, 256, args.repeats)
    print(f"resuming an epoch of {args.order_samples} samples, seconds:")
    for place, seconds in record["order"]["median"].items():
        print(f"  {place:<10}{seconds:.3f}")
    return record


def checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    case = StateCase(args.million_parameters)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure_checkpoints(case, args.repeats, args.folder or Path(temporary, "state"))
    median, gigabytes = found["median"], found["bytes"] / 1e9
    print(f"a state of {found['parameters'] / 1e6:.0f}M parameters, {gigabytes:.2f} GB; medians")
    for name, stall in median["stall_s"].items():
        print(
            f"  saved {name:<20} training stands still {stall:6.2f} s, "
            f"on the disk after {median['written_s'][name]:6.2f} s"
        )
    print(f"  of the stall {found['stall_left']:.3f} is left")
    for name, seconds in median["work_s"].items():
        print(f"  some matrix products {name:<14} {seconds:6.2f} s")
    for name in ("verify_s", "load_s"):
        print(f"  {name[:-2]:<7} {median[name]:6.2f} s, {gigabytes / median[name]:5.2f} GB/s")
    return {
        "what": "saving a checkpoint in the background against at once; verifying and loading it",
        "hardware": hardware(),
        "torch": torch.__version__,
        "case": vars(case),
        **found,
    }


def convert(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary, "convert")
        found = measure_converters(args.architecture, args.repeats, folder)
    size = found["bytes"] / 1e9
    print(f"{args.architecture.name}, {size:.2f} GB in bf16; bit-equal by way of another layout")
    for name, seconds in found["median_seconds"].items():
        line = f"  {name:<24}{seconds:>8.1f} s"
        if name in found["peak_bytes"]:
            speed = found["times_the_copys_speed"][name]
            line += f", {speed:.2f} times the copy's speed, "
            line += f"peak memory {found['peak_bytes'][name] / 1e9:.2f} GB"
        print(line)
    return {
        "what": "converters at real size against cp and sync",
        "hardware": hardware(),
        "torch": torch.__version__,
        "architecture": args.architecture.name,
        **found,
    }


def show(title: str, median: dict[str, dict[str, float]], baseline: str) -> None:
    print(f"{title:<40}{'samples/s':>11}{'CPU ms/sample':>15}  times as fast as {baseline}")
    for name, one in median.items():
        print(
            f"  {name:<38}{one['samples_per_s']:>11.1f}{one['cpu_ms_per_sample']:>15.2f}"
            f"  {one['times_as_fast']:.2f}"
        )


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
