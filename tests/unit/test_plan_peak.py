"""A plan's activations are an upper bound of what the executor holds, for every rank.

The executor runs one rank's list of a step on the CPU under the memory watch; what would come from
other ranks is zeros.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.model.payload import PassSize
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import ModelInput, Pass, TextCondition
from soar_mega.pipeline.actions import Action, Message
from soar_mega.pipeline.executor import Executor
from soar_mega.pipeline.recorder import NoRecorder
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.training.plan import Plan
from soar_mega.training.plan_stages import MemoryWatch
from tests.unit.test_plan import SMALL, model_folder, plan_of


class Links:
    """In place of the transport."""

    def __init__(self) -> None:
        self._posted: dict[Message, Tensor] = {}

    def post_receive(self, action: Action, message: Message, buffer: Tensor) -> None:
        self._posted[message] = buffer.zero_()

    def take(self, message: Message) -> Tensor:
        return self._posted.pop(message)

    def send(self, action: Action, message: Message, buffer: Tensor) -> None:
        pass

    def finish(self) -> None:
        assert not self._posted


class BatchEnds:
    """Inputs of every pass made before the step, a loss that keeps nothing."""

    def __init__(self, size: PassSize, passes: tuple[Pass, ...]) -> None:
        self._size = size
        self.latent_BCHW = torch.zeros(size.rows, SMALL.in_channels, size.height, size.width)
        self.inputs = {p.states: self._input(p.states) for p in passes}

    def _input(self, states: int) -> ModelInput:
        rows, text = states * self._size.rows, self._size.text_length
        return ModelInput(
            self.latent_BCHW.repeat(states, 1, 1, 1),
            torch.zeros(rows),
            TextCondition(
                torch.zeros(rows, text, SMALL.joint_attention_dim),
                torch.zeros(rows, SMALL.pooled_projection_dim),
            ),
        )

    def tensors(self) -> list[Tensor]:
        inputs = self.inputs.values()
        found = [(x.latent_BCHW, x.timestep_B, *vars(x.condition).values()) for x in inputs]
        return [self.latent_BCHW, *(tensor for tensors in found for tensor in tensors)]

    def size(self, p: Pass, microbatch: int) -> PassSize:
        return self._size._replace(rows=p.states * self._size.rows)

    def make_input(self, p: Pass, microbatch: int) -> ModelInput:
        return self.inputs[p.states]

    def take_output(self, p: Pass, microbatch: int, velocity_BCHW: Tensor) -> Tensor | None:
        return velocity_BCHW.sum() if p.grad else None

    def hand_over(self, microbatch: int) -> Tensor:
        return self.latent_BCHW

    def hand_over_like(self, microbatch: int, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(self.latent_BCHW, dtype=dtype)

    def receive(self, microbatch: int, handed: Tensor) -> None:
        pass


def measured_peak(plan: Plan, rank: int) -> int:
    """Most bytes that a rank's step holds beyond its states and its batch."""
    parallel, train = plan.config.parallel, plan.config.train
    ranks = parallel.pipeline_model_parallel_size
    schedule = build_schedule(
        parallel.pipeline_schedule,
        plan.passes,
        ranks=ranks,
        microbatches=plan.microbatches,
        virtual=parallel.virtual_pipeline_model_parallel_size,
    )
    mesh = replace(Mesh.single(), pipeline_rank=rank, pipeline_size=ranks)
    stages = [
        MMDiTStage(
            SMALL,
            mesh,
            TorchBackend(),
            layers=plan.layers[stage],
            activation_checkpointing=train.activation_checkpointing,
        )
        for stage in plan.stage_numbers(rank)
    ]
    flat = ShardedParameters(stages, mesh, torch.float32)
    ends, links = BatchEnds(plan.size, plan.passes), Links()
    buffers = [x for stage in stages for x in stage.buffers()]
    with MemoryWatch([flat.flat, flat.flat_grad, *buffers, *ends.tensors()]) as watch:
        Executor(schedule, stages, mesh, links).run(ends, NoRecorder())  # type: ignore[arg-type]
    return watch.peak


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("schedule", "ranks"), [("zero_bubble", 3), ("zero_bubble_v", 2), ("1f1b", 3)]
)
def test_planned_activations_bound_the_executors(
    tmp_path: Path, schedule: str, ranks: int, recompute: str
) -> None:
    sections: dict[str, Any] = {
        "objective": {"aux_group_size": 2, "num_rollout_paths": 1, "trajectory_length": 4},
        "parallel": {"pipeline_model_parallel_size": ranks, "pipeline_schedule": schedule},
        "precision": {"compute_dtype": "fp32"},
        "train": {"activation_checkpointing": recompute},
    }
    plan = plan_of(model_folder(tmp_path), ranks, **sections)
    for rank, memory in enumerate(plan.memory):
        bound = memory.activations + memory.working + memory.buffers
        peak = measured_peak(plan, rank)
        assert 0.8 * bound < peak <= bound
