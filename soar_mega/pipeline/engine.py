"""A rank's stages and all that runs over them: training steps, and forwards alone.

Legend: B rows, C/H/W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import LossTerms, MicroBatch, ModelInput, Objective
from soar_mega.pipeline.actions import Schedule
from soar_mega.pipeline.ends import ForwardEnds, ObjectiveEnds
from soar_mega.pipeline.executor import Executor, Stage
from soar_mega.pipeline.recorder import NoRecorder, Recorder
from soar_mega.pipeline.schedules import build_forwards
from soar_mega.pipeline.timeline import Timeline
from soar_mega.pipeline.transport import Transport


class Pipeline:
    """One process's part of a pipeline; every process of the run makes one.

    Args:
        stages: The stages this rank owns, by chunk.
        mesh: Where this process stands.
        schedule: Of every training step; its placement says which rank owns which stage.
        synchronous_sends: See ``Transport``.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        mesh: Mesh,
        schedule: Schedule,
        *,
        synchronous_sends: bool = False,
    ) -> None:
        self._mesh, self._stages, self._schedule = mesh, stages, schedule
        self._place = schedule.step.placement
        owned, ranks = len(stages), len(schedule.actions)
        if (owned, ranks) != (self._place.chunks, mesh.pipeline_size):
            raise ValueError(
                f"{owned} stages on each of {mesh.pipeline_size} pipeline ranks cannot run the "
                f"schedule {schedule.name} of {self._place.chunks} stages on each of {ranks}"
            )
        self._transport = None
        if mesh.pipeline_size > 1:
            self._transport = Transport(mesh, self._place, synchronous_sends=synchronous_sends)
        self._training = self._executor(schedule)
        # Forwards come in few sizes: a validation batch, a denoising step, the last of either.
        self._forwards = lru_cache(8)(
            lambda count: self._executor(build_forwards(self._place, count))
        )

    @property
    def owns_last(self) -> bool:
        """Whether the last stage is on this rank, and with it losses and velocities."""
        return self._place.rank(self._place.last_stage) == self._mesh.pipeline_rank

    def train_step(
        self,
        objective: Objective,
        microbatches: Sequence[MicroBatch],
        normaliser: Tensor,
        recorder: Recorder | None = None,
    ) -> list[LossTerms]:
        """All passes of all microbatches; gradients add up in the parameters.

        Args:
            objective: Declares the passes that the schedule was built from.
            microbatches: This data-parallel rank's share of the step, pulled before it begins:
                reading data in between could wait for a rank that waits for this one.
            normaliser: The global loss denominator, 0-d.
            recorder: Where to note times.

        Returns:
            The loss terms of each microbatch on the rank of the last stage, none on the others.

        Raises:
            PeerError: Another rank died, hangs or does not answer in time.
        """
        ends = ObjectiveEnds(
            objective,
            microbatches,
            normaliser,
            ends=(self._mesh.pipeline_rank == 0) + self.owns_last,
            is_last=self.owns_last,
        )
        self._training.run(ends, recorder or NoRecorder())
        return ends.terms()

    @torch.no_grad()
    def forward(self, inputs: Sequence[ModelInput]) -> list[Tensor]:
        """The velocity of each input, in the compute dtype, on the rank of the last stage.

        Every rank of the pipeline calls it with the same inputs; the others get an empty list.
        """
        ends = ForwardEnds(inputs)
        self._forwards(len(inputs)).run(ends, NoRecorder())
        return [ends.velocities[m] for m in range(len(inputs))] if self.owns_last else []

    def forward_everywhere(self, inputs: Sequence[ModelInput]) -> list[Tensor]:
        """As ``forward``, with the same bits on every rank of the pipeline."""
        velocities = self.forward(inputs)
        if self._mesh.pipeline_group is None:
            return velocities
        shapes = [x.latent_BCHW.shape for x in inputs]
        sizes = [shape.numel() for shape in shapes]
        if self.owns_last:
            flat = torch.cat([v.reshape(-1) for v in velocities])
        else:
            flat = torch.empty(sum(sizes), dtype=self._stages[0].dtype, device=self._mesh.device)
        source = self._mesh.pipeline_peer(self._place.rank(self._place.last_stage))
        with waiting_for(f"velocities from process {source}"):
            dist.broadcast(flat, source, group=self._mesh.pipeline_group)
        return [x.view(shape) for x, shape in zip(flat.split(sizes), shapes, strict=True)]

    def gather_timeline(self, recorder: Recorder) -> Timeline | None:
        """The recorded step of all ranks of this pipeline, on its rank 0; collective."""
        events = recorder.events()
        parts = [events]
        if self._mesh.pipeline_group is not None:
            parts = [[] for _ in range(self._mesh.pipeline_size)]
            with waiting_for("its pipeline's ranks, to gather a timeline"):
                dist.all_gather_object(parts, events, group=self._mesh.pipeline_group)
        if self._mesh.pipeline_rank != 0:
            return None
        return Timeline(
            self._schedule.name, self._schedule.step, tuple(tuple(part) for part in parts), "s"
        )

    def _executor(self, schedule: Schedule) -> Executor:
        mesh = self._mesh
        return Executor(schedule, self._stages, mesh, self._transport)
