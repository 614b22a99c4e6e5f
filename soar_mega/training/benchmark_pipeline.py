"""Measures pipeline schedules with the real executor, beside what the simulator says of them.

``sleeping`` replaces computing by sleeping, so that many ranks can be measured on few cores: it
shows the executor's own behaviour, its messages and waits. ``computing`` trains a real model on two
processes of one core each. Both run every schedule in turn, in an order that is turned round each
time, and compare medians within one call.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from soar_mega.backends.torch import TorchBackend
from soar_mega.config import SoarConfig
from soar_mega.model.init import initialise
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import MicroBatch, Objective
from soar_mega.pipeline.actions import Placement, Schedule
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.recorder import Recorder
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.pipeline.simulator import Costs, simulate
from soar_mega.pipeline.stages import cut_layers
from soar_mega.pipeline.timeline import Timeline
from soar_mega.telemetry.flops import layer_costs
from soar_mega.training.benchmark import Case
from soar_mega.training.benchmark_sleeping import IdleObjective, SleepingStage, idle_microbatch

BASELINE = "sequential"


@dataclass(frozen=True)
class Measured:
    """One schedule, measured and simulated.

    Attributes:
        seconds: Makespan of each repeat.
        bubble: 1 - work / makespan of the median repeat.
        simulated: Makespan the simulator gives, in seconds or units.
        timeline: The median repeat.
    """

    seconds: list[float]
    bubble: float
    simulated: float
    timeline: Timeline


def sleeping(
    schedules: Sequence[str], ranks: int, microbatches: int, unit: float, repeats: int
) -> dict[str, Measured]:
    """Stages that sleep: forward, input and weight gradient a ``unit`` of seconds each a rank."""
    timelines = _on_ranks(ranks, _sleeping_rank, schedules, microbatches, repeats, unit)
    return _beside_simulation(timelines, lambda _: None)


def computing(
    schedules: Sequence[str], ranks: int, microbatches: int, case: Case, repeats: int
) -> dict[str, Measured]:
    """A real model, a core for each process; the simulator is fed with the measured costs."""
    timelines = _on_ranks(ranks, _computing_rank, schedules, microbatches, repeats, case)
    return _beside_simulation(timelines, Costs.of)


def ratios(results: dict[str, Measured]) -> dict[str, dict[str, float]]:
    """Per schedule: how much faster than the sequential one, measured and simulated."""
    base = results[BASELINE]
    return {
        name: {
            "measured": statistics.median(base.seconds) / statistics.median(found.seconds),
            "simulated": base.simulated / found.simulated,
        }
        for name, found in results.items()
    }


def _beside_simulation(
    timelines: dict[str, list[Timeline]], costs: Callable[[list[Timeline]], Costs | None]
) -> dict[str, Measured]:
    """Each schedule's repeats, and the simulation with ``costs`` of these."""
    results = {}
    for name, lines in timelines.items():
        lines.sort(key=lambda line: line.makespan)
        median, step = lines[len(lines) // 2], lines[0].step
        schedule = build_schedule(
            name,
            step.passes,
            ranks=step.placement.ranks,
            microbatches=step.microbatches,
            virtual=step.placement.chunks,
        )
        simulated = float(simulate(schedule, costs(lines)).makespan)
        results[name] = Measured(
            [line.makespan for line in lines], median.bubble, simulated, median
        )
    return results


def _objective(case: Case) -> Objective:
    soar = SoarConfig(
        name="soar",
        trajectory_length=case.trajectory_length,
        aux_group_size=case.aux_group_size,
    )
    return make_objective(soar, shift=3.0, seed=0)


def _sleeping_rank(
    schedules: Sequence[str], microbatches: int, repeats: int, unit: float
) -> dict[str, list[Timeline]]:
    mesh = Mesh.build(pipeline_size=dist.get_world_size())
    objective = IdleObjective(_objective(Case()))
    pipelines = {}
    for name in schedules:
        schedule = _schedule(name, objective, mesh, microbatches)
        chunks = schedule.step.placement.chunks
        stages = [SleepingStage(unit / chunks) for _ in range(chunks)]
        pipelines[name] = Pipeline(stages, mesh, schedule)
    micros = [idle_microbatch()] * microbatches
    return _alternate(pipelines, objective, micros, repeats, mesh)


def _schedule(name: str, objective: Objective, mesh: Mesh, microbatches: int) -> Schedule:
    return build_schedule(
        name, objective.passes(), ranks=mesh.pipeline_size, microbatches=microbatches
    )


def _computing_rank(
    schedules: Sequence[str], microbatches: int, repeats: int, case: Case
) -> dict[str, list[Timeline]]:
    mesh = Mesh.build(pipeline_size=dist.get_world_size())
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[mesh.rank % len(cores)]})
    objective, before, pipelines = _objective(case), [], {}
    for name in schedules:
        schedule = _schedule(name, objective, mesh, microbatches)
        stages = _stages(case, mesh, schedule.step.placement)
        before.append(ShardedParameters(stages, mesh).zero_gradients)
        pipelines[name] = Pipeline(stages, mesh, schedule)
    micros = [case.microbatch()] * microbatches
    return _alternate(
        pipelines, objective, micros, repeats, mesh, before=lambda: [zero() for zero in before]
    )


def _stages(case: Case, mesh: Mesh, placement: Placement) -> list[MMDiTStage]:
    """The stages this rank owns, by chunk, with fresh weights."""
    architecture, image = case.architecture(), (case.latent_size // 2) ** 2
    cut = cut_layers(*layer_costs(architecture, image, case.text_tokens), placement.stages)
    stages = []
    for chunk in range(placement.chunks):
        layers = cut[placement.stage(mesh.pipeline_rank, chunk)]
        stages.append(MMDiTStage(architecture, mesh, TorchBackend(), layers=layers))
        initialise(stages[-1], 0)
    return stages


def _alternate(
    pipelines: dict[str, Pipeline],
    objective: Objective,
    micros: list[MicroBatch],
    repeats: int,
    mesh: Mesh,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[Timeline]]:
    """Timelines by schedule, on rank 0; the first round is not counted."""
    found: dict[str, list[Timeline]] = {name: [] for name in pipelines}
    normaliser = torch.ones(())
    for repeat in range(repeats + 1):
        for name in list(pipelines)[:: 1 if repeat % 2 else -1]:
            before()
            dist.barrier()
            recorder = Recorder(mesh.device)
            pipelines[name].train_step(objective, micros, normaliser, recorder)
            timeline = pipelines[name].gather_timeline(recorder)
            if timeline is not None and repeat:
                found[name].append(timeline)
    return found


def _on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns on rank 0 of ``ranks`` gloo processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_enter, args=(rank, ranks, folder, work, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a process of the benchmark failed: see its message above")
        return torch.load(Path(folder) / "result", weights_only=False)


def _enter(
    rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    result = work(*arguments)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()
