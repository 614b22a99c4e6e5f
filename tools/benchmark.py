#!/usr/bin/env python
"""Benchmarks; each compares its sides within one call and prints ratios of medians.

gpu         speed and memory of a training step of SD3.5-Medium and -Large on one GPU, in many
            variants, against the published procedure on diffusers' own model
cpu         the same with a small model in fp32 on the CPU
show        the tables, and the picture, of a record that gpu or cpu wrote
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

from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.config import ConfigError
from soar_mega.pipeline.schedules import SCHEDULES
from soar_mega.telemetry.files import write_whole
from soar_mega.training.benchmark import Case, hardware
from soar_mega.training.benchmark_checkpoint import StateCase, measure_checkpoints
from soar_mega.training.benchmark_convert import measure_converters
from soar_mega.training.benchmark_data import PictureCase, measure_order, measure_pictures
from soar_mega.training.benchmark_encoded import EncodedCase, measure_encoded
from soar_mega.training.benchmark_pipeline import BASELINE, Measured, computing, ratios, sleeping
from soar_mega.training.benchmark_step.compare import Plan
from soar_mega.training.benchmark_step.load import Load, published, with_optimizer_if_it_fits
from soar_mega.training.benchmark_step.picture import draw
from soar_mega.training.benchmark_step.record import measure_all, read_record
from soar_mega.training.benchmark_step.report import lines
from soar_mega.training.benchmark_step.variants import DEFAULTS, Variant, parse_variant


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.what in ("schedules", "pipeline") and args.microbatches is None:
        args.microbatches = args.processes
    commands = {
        "gpu": gpu,
        "cpu": cpu,
        "show": show_record,
        "schedules": schedules,
        "pipeline": pipeline,
        "data": data,
        "checkpoint": checkpoint,
        "convert": convert,
    }
    try:
        record = commands[args.what](args)
    except (ConfigError, CheckpointError) as error:
        parser.error(str(error))
    write(record, args.out)


def write(record: dict[str, Any], out: Path | None) -> None:
    """A record with the command it is from."""
    if out is not None:
        command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
        write_whole(out, json.dumps({"command": command} | record, indent=2) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/benchmark.py cpu --repeats 5 --out result.json",
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

    def compared(one: argparse.ArgumentParser, *, steps: int, warmup: int) -> None:
        one.add_argument(
            "--objective",
            nargs="+",
            choices=("soar", "sft"),
            default=["soar"],
            help="SOAR with one path, or flow matching",
        )
        one.add_argument(
            "--variant",
            action="append",
            metavar="KEY=VALUE,...",
            help="what to measure, repeatable ('' is torch, nothing recomputed); keys: "
            f"{', '.join(field.name for field in fields(Variant))}; None: a list of them",
        )
        one.add_argument(
            "--micro-batch",
            nargs="+",
            type=positive,
            default=[],
            help="samples a step; []: as in configs/, else 4",
        )
        one.add_argument(
            "--no-reference", action="store_true", help="measure the given variants only"
        )
        one.add_argument("--steps", type=positive, default=steps, help="timed, of a measurement")
        one.add_argument("--warmup", type=positive, default=warmup, help="steps before those")
        one.add_argument("--plot", type=Path, help="draw the record, as PNG or SVG")

    one = command("gpu")
    architectures = Path("configs/architectures")
    one.add_argument(
        "--architecture",
        nargs="+",
        type=Path,
        default=[architectures / "sd35_medium"],
        help=f"folders with transformer/config.json, as {architectures / 'sd35_large'}",
    )
    one.add_argument(
        "--optimizer",
        choices=("auto", "on", "off"),
        default="auto",
        help="AdamW on both sides; auto: where its state takes at most 0.6 of the memory",
    )
    compared(one, steps=3, warmup=2)
    one = command("cpu")
    compared(one, steps=2, warmup=1)
    case(one, "batch", "aux_group_size")
    one = commands.add_parser("show", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("record", type=Path, help="of gpu or cpu, or of step, as cpu was called once")
    one.add_argument("--plot", type=Path, help="draw it, as PNG or SVG")
    one.set_defaults(out=None)
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


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def gpu(args: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise ConfigError(
            "gpu needs a CUDA device, and torch finds none: use a machine with one, or "
            "tools/benchmark.py cpu"
        )
    memory = torch.cuda.get_device_properties(0).total_memory
    loads = [
        published(folder, objective, optimizer=args.optimizer == "on")
        for folder in args.architecture
        for objective in args.objective
    ]
    if args.optimizer == "auto":
        loads = [with_optimizer_if_it_fits(load, memory) for load in loads]
    return comparison(loads, args)


def cpu(args: argparse.Namespace) -> dict[str, Any]:
    case = case_of(args, batch=0, aux_group_size=1)
    loads = [
        Load(
            "small",
            case.architecture(),
            objective,
            device="cpu",
            dtype="fp32",
            latent_size=case.latent_size,
            text_tokens=case.text_tokens,
            trajectory_length=case.trajectory_length,
            threads=case.threads,
        )
        for objective in args.objective
    ]
    return comparison(loads, args)


def check_files(out: Path | None, plot: Path | None) -> None:
    """Before anything is measured, so that it is not for nothing."""
    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {path.parent}: make it first")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {plot}: a picture's name must end in .png or .svg")


def comparison(loads: list[Load], args: argparse.Namespace) -> dict[str, Any]:
    check_files(args.out, args.plot)
    variants = DEFAULTS[loads[0].device]
    if args.variant is not None:
        variants = tuple(parse_variant(spec) for spec in args.variant)
    plan = Plan(
        tuple(loads),
        variants,
        tuple(args.micro_batch),
        with_reference=not args.no_reference,
        repeats=args.repeats,
        steps=args.steps,
        warmup=args.warmup,
    )
    # Written after each measurement: what is done is not lost when the time is up.
    record = measure_all(plan, say=print, keep=lambda part: write(part, args.out))
    print_and_draw(record, args.plot)
    return record


def show_record(args: argparse.Namespace) -> dict[str, Any]:
    check_files(None, args.plot)
    record = read_record(args.record)
    print_and_draw(record, args.plot)
    return record


def print_and_draw(record: dict[str, Any], plot: Path | None) -> None:
    print(*lines(record), sep="\n")
    if plot is not None:
        draw(record, plot)


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
            whole = found["times_the_copys_speed"][name]
            started = found["times_the_copys_speed_once_started"][name]
            line += f", {whole:.2f} times the copy's speed ({started:.2f} once started), "
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
