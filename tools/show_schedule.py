#!/usr/bin/env python
"""Shows a pipeline schedule: bubble, makespan and what each rank keeps in memory.

Builds the schedule, checks it (complete, ordered, free of deadlock with blocking sends, within its
memory bound) and runs it against a cost model. Costs are those of one microbatch through a whole
rank's share of the model; the unit is yours. "Live" counts microbatches whose activations a rank
keeps, from the forward of a pass with gradient until its weight gradient is done.

    tools/show_schedule.py --pipeline 4 --microbatches 8 --schedule zero_bubble --picture zb.svg

With --recorded it shows a step that a run has recorded (logging.timeline_step), beside the
simulator fed with the costs of that step; --picture is of the real step, --trace of both.

    tools/show_schedule.py --recorded runs/x/timeline/step_00000003.json --picture real.svg
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from soar_mega.config.objective import FlowMatchingConfig, SoarConfig
from soar_mega.objectives import make_objective
from soar_mega.passes import Pass
from soar_mega.pipeline.actions import Schedule
from soar_mega.pipeline.schedules import SCHEDULES, build_schedule
from soar_mega.pipeline.simulator import Costs, simulate
from soar_mega.pipeline.timeline import Timeline
from soar_mega.pipeline.timeline_picture import draw
from soar_mega.pipeline.timeline_table import summary, table
from soar_mega.pipeline.trace import write_trace
from soar_mega.pipeline.validator import validate


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.recorded is None and None in (args.pipeline, args.microbatches):
        parser.error("--pipeline and --microbatches are needed, or --recorded")
    try:
        schedule, timelines = recorded(args.recorded) if args.recorded else simulated(args)
        if args.picture:
            title = f"{schedule.name}, a real step" if args.recorded else title_of(args)
            draw(timelines[0], args.picture, title, schedule.live_bound)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.trace:
        write_trace(args.trace, timelines)
    if args.json:
        shown = [summary(timeline, schedule) for timeline in timelines]
        print(json.dumps(shown[0] | ({"simulated": shown[1]} if shown[1:] else {}), indent=2))
    else:
        print("\n\n".join(table(timeline, schedule) for timeline in timelines))


def simulated(args: argparse.Namespace) -> tuple[Schedule, list[Timeline]]:
    """The schedule asked for, checked, and how it runs under the cost model."""
    schedule = build_schedule(
        args.schedule,
        passes_of(args),
        ranks=args.pipeline,
        microbatches=args.microbatches,
        virtual=args.virtual_stages,
    )
    validate(schedule)
    costs = Costs(
        args.cost_forward,
        args.cost_input_backward,
        args.cost_weight_backward,
        tuple(args.cost_stages) if args.cost_stages else None,
        latency=args.cost_latency,
    )
    return schedule, [simulate(schedule, costs)]


def recorded(path: Path) -> tuple[Schedule, list[Timeline]]:
    """A recorded step, and the simulation of its schedule with its own costs."""
    real = Timeline.load(path)
    place = real.step.placement
    schedule = build_schedule(
        real.name,
        real.step.passes,
        ranks=place.ranks,
        microbatches=real.step.microbatches,
        virtual=place.chunks,
    )
    model = replace(simulate(schedule, Costs.of([real])), name=f"{real.name}, simulated")
    return schedule, [real, model]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    soar = SoarConfig(name="soar")

    def add(flag: str, text: str, default: object = None, **more: object) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(flag, default=default, help=text + shown, **more)  # type: ignore[arg-type]

    add("--recorded", "show this recorded step instead", type=Path, metavar="FILE.json")
    add("--pipeline", "pipeline ranks", type=int, metavar="P")
    add("--microbatches", "of a step on one data-parallel rank", type=int, metavar="M")
    add("--schedule", "how to order the step", "zero_bubble", choices=SCHEDULES)
    add(
        "--virtual-stages",
        "chunks a rank (default: 2 for interleaved_1f1b and zero_bubble_v, 1 for the others)",
        type=int,
        metavar="V",
    )
    add("--objective", "what a step trains", "soar", choices=("flow_matching", "soar"))
    for name in ("trajectory_length", "num_rollout_paths", "aux_group_size"):
        kind = {"type": int, "metavar": "N"}
        add(f"--{name.replace('_', '-')}", "as in the config", getattr(soar, name), **kind)
    add(
        "--cfg-scale-sampling",
        "as in the config; 1: no rollout pass",
        soar.cfg_scale_sampling,
        type=float,
        metavar="G",
    )
    add(
        "--reuse-base-forward",
        "as in the config: the base pass is the conditional half of the guided velocity",
        soar.reuse_base_forward,
        action=argparse.BooleanOptionalAction,
    )
    costs = Costs()
    for name in ("forward", "input_backward", "weight_backward", "latency"):
        text = "time from a send to its arrival" if name == "latency" else f"time of a {name}"
        flag = f"--cost-{name.replace('_', '-')}"
        add(flag, text.replace("_", " "), getattr(costs, name), type=float, metavar="T")
    add(
        "--cost-stages",
        "share of each stage, in the order a microbatch visits them, 1/V being the mean",
        type=lambda text: [float(part) for part in text.split(",")],
        metavar="T,T,...",
    )
    add("--picture", "draw the timeline", type=Path, metavar="FILE.png|.svg")
    add("--trace", "write a trace for ui.perfetto.dev", type=Path, metavar="FILE.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def passes_of(args: argparse.Namespace) -> tuple[Pass, ...]:
    """The passes the training objective itself declares under these settings."""
    if args.objective == "flow_matching":
        config = FlowMatchingConfig(name="flow_matching")
    else:
        config = SoarConfig(
            name="soar",
            trajectory_length=args.trajectory_length,
            num_rollout_paths=args.num_rollout_paths,
            aux_group_size=args.aux_group_size,
            cfg_scale_sampling=args.cfg_scale_sampling,
            reuse_base_forward=args.reuse_base_forward,
        )
    return make_objective(config, shift=3.0, seed=0).passes()


def title_of(args: argparse.Namespace) -> str:
    """First line of the picture."""
    words = [args.schedule, f"{args.pipeline} ranks"]
    if args.virtual_stages:
        words.append(f"{args.virtual_stages} chunks each")
    words += [f"{args.microbatches} microbatches", args.objective.replace("_", " ")]
    if args.objective == "soar":
        paths, states = args.num_rollout_paths, args.trajectory_length
        words.append(
            f"{paths} path{'s' * (paths > 1)} of {states} auxiliary state{'s' * (states != 1)}"
        )
    return ", ".join(words)


if __name__ == "__main__":
    main()
