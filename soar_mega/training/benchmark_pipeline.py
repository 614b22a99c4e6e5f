"""Measures pipeline schedules with the real executor, beside what the simulator says of them.

``sleeping`` replaces computing by sleeping, so that many ranks can be measured on few cores: it
shows the executor's own behaviour, its messages and waits. ``computing`` trains a real model on two
processes of one core each. Both run every schedule in turn, in an order that is turned round each
time, and compare medians within one call.

Legend: B rows, C/H/W latent channels, height, width, D width.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.config import SoarConfig
from soar_mega.model.init import initialise
from soar_mega.model.payload import PassSize, Payload, PayloadShapes
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import LossTerms, MicroBatch, ModelInput, Objective, Pass, TextCondition
from soar_mega.pipeline.actions import Schedule
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.recorder import Recorder
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.pipeline.simulator import Costs, simulate
from soar_mega.pipeline.stages import cut_layers
from soar_mega.pipeline.timeline import Timeline
from soar_mega.telemetry.flops import block_flops, embedding_flops, head_flops
from soar_mega.training.benchmark import Case

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
    return _measure(_sleeping_rank, ranks, schedules, microbatches, repeats, unit)


def computing(
    schedules: Sequence[str], ranks: int, microbatches: int, case: Case, repeats: int
) -> dict[str, Measured]:
    """A real model, a core for each process; the simulator is fed with the measured costs."""
    return _measure(_computing_rank, ranks, schedules, microbatches, repeats, case)


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


def _measure(
    work: Callable[..., dict[str, list[Timeline]]],
    ranks: int,
    schedules: Sequence[str],
    microbatches: int,
    repeats: int,
    what: Any,
) -> dict[str, Measured]:
    timelines = _on_ranks(ranks, work, schedules, microbatches, repeats, what)
    costs = None
    if work is _computing_rank:
        costs = Costs.of([line for lines in timelines.values() for line in lines])
    passes = next(iter(timelines.values()))[0].step.passes
    results = {}
    for name, lines in timelines.items():
        lines.sort(key=lambda line: line.makespan)
        median = lines[len(lines) // 2]
        schedule = build_schedule(name, passes, ranks=ranks, microbatches=microbatches)
        results[name] = Measured(
            [line.makespan for line in lines],
            median.bubble,
            float(simulate(schedule, costs).makespan),
            median,
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
    objective = _Idle(_objective(Case()))
    pipelines = {}
    for name in schedules:
        schedule = _schedule(name, objective, mesh, microbatches)
        chunks = schedule.step.placement.chunks
        stages = [SleepingStage(unit / chunks) for _ in range(chunks)]
        pipelines[name] = Pipeline(stages, mesh, schedule)
    nothing = torch.zeros(1, 1)
    micro = MicroBatch(
        0,
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, 1, 1, 1),
        TextCondition(nothing[None], nothing),
        TextCondition(nothing[None], nothing),
        torch.ones(1),
    )
    return _alternate(pipelines, objective, [micro] * microbatches, repeats, mesh)


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
    architecture, image = case.architecture(), (case.latent_size // 2) ** 2
    cut = cut_layers(
        [block_flops(architecture, n, image, case.text_tokens) for n in range(case.layers)],
        embedding_flops(architecture, image, case.text_tokens),
        head_flops(architecture, image),
        mesh.pipeline_size,
    )
    stage = MMDiTStage(architecture, mesh, TorchBackend(), layers=cut[mesh.pipeline_rank])
    initialise(stage, 0)
    parameters = ShardedParameters([stage], mesh)
    objective = _objective(case)
    pipelines = {
        name: Pipeline([stage], mesh, _schedule(name, objective, mesh, microbatches))
        for name in schedules
    }
    micros = [case.microbatch()] * microbatches
    return _alternate(pipelines, objective, micros, repeats, mesh, before=parameters.zero_gradients)


def _alternate(
    pipelines: dict[str, Pipeline],
    objective: Objective,
    micros: list[MicroBatch],
    repeats: int,
    mesh: Mesh,
    before: Callable[[], None] = lambda: None,
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


class SleepingStage:
    """A stage of an imaginary model; one number a tensor.

    Args:
        seconds: Of a forward, of an input gradient and of a weight gradient.
    """

    dtype = torch.float32

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.held: list[Callable[[], None]] | None = None

    def embed(self, x: ModelInput) -> Payload:
        return Payload(*(torch.zeros(1, 1, 1, requires_grad=True) for _ in range(3)))

    def run(self, payload: Payload, size: PassSize) -> Payload:
        return Payload(*_Sleep.apply(*payload.tensors, self))

    def velocity(self, payload: Payload, size: PassSize) -> Tensor:
        return sum(self.run(payload, size).tensors).view(1, 1, 1, 1)  # type: ignore[union-attr]

    def payload_shapes(self, rows: int, height: int, width: int, text_length: int) -> PayloadShapes:
        return PayloadShapes((1, 1, 1), (1, 1, 1), (1, 1, 1))

    @contextmanager
    def hold_weight_gradients(self) -> Iterator[list[Callable[[], None]]]:
        held: list[Callable[[], None]] = []
        self.held = held
        yield held
        self.held = None


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.stage = parts
        time.sleep(ctx.stage.seconds)
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stage = ctx.stage
        time.sleep(stage.seconds)
        if stage.held is None:
            time.sleep(stage.seconds)
        else:
            stage.held.append(lambda: time.sleep(stage.seconds))
        return (*gradients, None)


class _Idle:
    """An objective's passes without its arithmetic."""

    def __init__(self, like: Objective) -> None:
        self._passes = like.passes()

    def passes(self) -> tuple[Pass, ...]:
        return self._passes

    def begin(self, micro: MicroBatch) -> MicroBatch:
        return micro

    def count(self, micro: MicroBatch) -> Tensor:
        return torch.ones(2, dtype=torch.float64)

    def normaliser(self, counts: Tensor) -> Tensor:
        return torch.ones(())

    def make_input(self, p: Pass, state: MicroBatch) -> ModelInput:
        return ModelInput(state.clean_BCHW, state.weight_B, state.prompt)

    def take_output(
        self, p: Pass, state: MicroBatch, velocity_BCHW: Tensor, normaliser: Tensor
    ) -> Tensor | None:
        return velocity_BCHW.sum() if p.grad else None

    def hand_over(self, state: MicroBatch) -> Tensor:
        return state.clean_BCHW

    def receive(self, state: MicroBatch, guided_BCHW: Tensor) -> None:
        pass

    def terms(self, state: MicroBatch) -> LossTerms:
        return LossTerms(*(state.weight_B for _ in range(5)))


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
