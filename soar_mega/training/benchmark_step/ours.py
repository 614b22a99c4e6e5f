"""This project's side of the comparison: stages, flat buffers, pipeline and AdamW of a run.

Built as ``training.setup`` builds a run on one process, without data, EMA, metrics and the decision
whether a step is skipped.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soar_mega.backends import Backend
from soar_mega.backends.elementwise import Elementwise
from soar_mega.backends.te.backend import TEBackend
from soar_mega.backends.torch import TorchBackend
from soar_mega.config.precision import PrecisionConfig, check_recomputation
from soar_mega.config.schema import OptimizerConfig
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.recompute import compiled_run_block
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import MicroBatch
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.training.benchmark_step.load import LEARNING_RATE, MAX_GRAD_NORM, SHIFT, Load
from soar_mega.training.benchmark_step.variants import Variant
from soar_mega.training.optimizer import ShardOptimizer
from soar_mega.training.precision import check_backend


def make_stages(variant: Variant, architecture: MMDiTConfig, mesh: Mesh) -> list[MMDiTStage]:
    """The stages of a variant, without weights: one, the whole model.

    Raises:
        ConfigError, ValueError: Its backend or recipe does not run here, or does not go with its
            recomputation.
    """
    precision = PrecisionConfig(
        backend=variant.backend,
        fp8_recipe=variant.fp8_recipe,
        compile=variant.compile,
    )
    check_backend(precision, mesh.device)
    recompute = variant.activation_checkpointing
    check_recomputation(precision, recompute)
    options: dict[str, Any] = {}
    if variant.backend == "te":
        elementwise = Elementwise.compiled() if variant.compile else Elementwise()
        backend: Backend = TEBackend(precision.recipe, elementwise=elementwise)
    else:
        backend = TorchBackend()
        if variant.compile:
            options["call_block"] = compiled_run_block()
    return [MMDiTStage(architecture, mesh, backend, activation_checkpointing=recompute, **options)]


class OurSide:
    """A training run's step on made-up data.

    Args:
        load: What is computed.
        variant: How.

    Attributes:
        stages, parameters, objective: Of the run.

    Raises:
        ConfigError: See ``make_stages``.
    """

    def __init__(self, load: Load, variant: Variant) -> None:
        mesh = Mesh.single(load.device)
        self.stages = make_stages(variant, load.architecture, mesh)
        for stage in self.stages:
            _fill(stage)
        self.parameters = ShardedParameters(self.stages, mesh, load.torch_dtype)
        self.objective = make_objective(load.settings(variant), shift=SHIFT, seed=0)
        schedule = build_schedule("1f1b", self.objective.passes(), ranks=1, microbatches=1)
        self._pipeline = Pipeline(self.stages, mesh, schedule)
        self._micro, self._done = load.microbatch(variant), 0
        self._device = torch.device(load.device)
        self._optimizer: ShardOptimizer | None = None
        if load.optimizer:
            self._optimizer = ShardOptimizer(
                self.parameters.master_shard, OptimizerConfig(learning_rate=LEARNING_RATE)
            )
        # So that all that stays exists before memory is looked at: zero pages of a CPU do not.
        self.parameters.zero_gradients()
        self._update()

    def step(self) -> Tensor:
        """One training step, with draws of its own; the loss, 0-d."""
        self.parameters.zero_gradients()
        with self.stages[0].backend.training_step(watch=False):
            loss = self.backward(replace(self._micro, step=self._done))
        self._update()
        self._done += 1
        return loss

    def backward(self, micro: MicroBatch) -> Tensor:
        """Adds the gradients of a microbatch; the loss, 0-d."""
        normaliser = self.objective.normaliser(self.objective.count(micro).to(self._device))
        (terms,) = self._pipeline.train_step(self.objective, [micro], normaliser)
        return (terms.base_B.sum() + terms.aux_KB.sum()) / normaliser

    def _update(self) -> None:
        if self._optimizer is None:
            return
        gradient = self.parameters.reduce_gradients()
        norm = self.parameters.gradient_norm(gradient)
        gradient.mul_(torch.clamp(MAX_GRAD_NORM / (norm + 1e-6), max=1.0).to(gradient.dtype))
        self._optimizer.update(gradient, LEARNING_RATE)
        self.parameters.publish()


@torch.no_grad()
def _fill(stage: MMDiTStage) -> None:
    """Random weights of the usual size, made on the device.

    ``model.init`` has the same distribution but gives every layout the same numbers, which costs
    more than all steps measured here. The position table is random, too.
    """
    generator = torch.Generator(stage.mesh.device).manual_seed(0)
    for name, parameter in stage.named_parameters():
        if ".norm_" in name:
            parameter.fill_(1.0)
        elif parameter.dim() > 1:
            fan_in = parameter.shape[-1]
            parameter.normal_(0.0, 1.0 / math.sqrt(3 * fan_in), generator=generator)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    for buffer in stage.buffers():
        buffer.normal_(generator=generator)
