"""One optimizer step: passes, one reduction of gradients, clipping, update, EMA, new weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from soar_mega.config import Config
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import MicroBatch, Objective
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.recorder import Recorder
from soar_mega.training.health import Health
from soar_mega.training.optimizer import ShardEMA, ShardOptimizer, learning_rate
from soar_mega.training.report import largest_over_ranks, loss_metrics


class Stepper:
    """Everything that changes in a step, and the step.

    Args:
        config, mesh: Of the run.
        stages: The stages this rank owns, by chunk.
        pipeline: Runs passes over them.
        parameters: Theirs.
        objective: What is trained.

    Attributes:
        health: Decides which steps are skipped.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        stages: Sequence[MMDiTStage],
        pipeline: Pipeline,
        parameters: ShardedParameters,
        objective: Objective,
    ) -> None:
        self.config, self.mesh, self.stages, self.pipeline = config, mesh, stages, pipeline
        self.parameters, self.objective = parameters, objective
        self.optimizer = ShardOptimizer(parameters.master_shard, config.optimizer)
        self.ema = ShardEMA(parameters.master_shard, config.train.ema_decay)
        self.health = Health(config.train)
        self._lambda_aux = float(getattr(config.objective, "lambda_aux", 0.0))
        self._num_states = sum(p.states for p in objective.passes() if p.kind == "aux")

    @property
    def architecture(self) -> MMDiTConfig:
        """Of the whole model."""
        return self.stages[0].config

    def run(
        self, step: int, microbatches: Sequence[MicroBatch], recorder: Recorder | None = None
    ) -> dict[str, float]:
        """Train on one global batch, or leave everything as it is where ``health`` refuses it.

        Args:
            step: From 0.
            microbatches: All of this rank's, pulled before the first pass.
            recorder: Where to note when each action of the schedule ran.

        Returns:
            ``train/*`` and ``optim/*`` metrics, equal on every rank.

        Raises:
            PeerError: Another rank died, hangs or does not answer in time.
        """
        self.parameters.zero_gradients()
        counts = torch.stack([self.objective.count(micro) for micro in microbatches]).sum(dim=0)
        counts = counts.to(self.mesh.device)
        if self.mesh.data_group is not None:
            with waiting_for("data-parallel peers, to count samples"):
                dist.all_reduce(counts, group=self.mesh.data_group)
        every, backend = self.config.logging.fp8_statistics_steps, self.stages[0].backend
        with backend.training_step(watch=every is not None and (step + 1) % every == 0):
            terms = self.pipeline.train_step(
                self.objective, microbatches, self.objective.normaliser(counts), recorder
            )
        gradient = self.parameters.reduce_gradients()
        norm = self.parameters.gradient_norm(gradient)
        metrics = loss_metrics(
            terms,
            microbatches,
            self._num_states,
            self.config.train.global_batch_size,
            self._lambda_aux,
            self.config.logging.timestep_bins,
            self.mesh,
        )
        lr = learning_rate(self.config.optimizer, step, self.config.train.max_train_steps)
        metrics |= {"optim/grad_norm": float(norm), "optim/lr": lr}
        metrics |= largest_over_ranks(backend.statistics(), self.mesh)
        # Before clipping, which would make NaN of all weights, and hide a spike.
        if not self.health.judge(metrics["train/loss"], metrics["optim/grad_norm"]):
            backend.forget_step()
            return metrics
        limit = self.config.train.max_grad_norm
        gradient.mul_(torch.clamp(limit / (norm + 1e-6), max=1.0).to(gradient.dtype))
        self.optimizer.update(gradient, lr)
        self.ema.update(self.parameters.master_shard, self.optimizer.step)
        self.parameters.publish()
        return metrics
