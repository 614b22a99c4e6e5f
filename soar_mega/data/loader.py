"""All microbatches of a step, at once and before any pass starts.

The loader plans steps in order, has their samples read ahead, samples the VAE's posterior and hands
a data-parallel rank its microbatches. What a step holds is a function of (seed, data, step) only;
``Batch.plan.after`` is all there is to save.

Legend: B slots of a microbatch, C/H/W latent channels, height, width, K kinds of bad samples.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.data.encoders import sample_latents
from soar_mega.data.errors import BAD_KINDS
from soar_mega.data.model_folder import ModelFacts
from soar_mega.data.plan import Planner, StepPlan
from soar_mega.data.rows import RowSource
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import MicroBatch, TextCondition
from soar_mega.rng import Purpose, normal


@dataclass(frozen=True)
class Batch:
    """A data-parallel rank's part of a step.

    Attributes:
        microbatches: In slot order. A bad sample keeps its slot with weight 0.
        bad_K: int64 counts of bad samples by ``BAD_KINDS``, on the CPU.
        plan: Which samples stand in which slots.
    """

    microbatches: list[MicroBatch]
    bad_K: Tensor
    plan: StepPlan


class StepLoader:
    """Loads a data-parallel rank's part of steps, one after the other.

    Args:
        planner: Says what stands in each step.
        source: Brings it.
        facts: For the latents' scale.
        mesh: This process's place.
        seed: The run's seed (posterior noise).
        micro_batch_size: Slots a microbatch.
        prefetch_steps: Steps handed to ``source`` before they are asked for.
    """

    def __init__(
        self,
        planner: Planner,
        source: RowSource,
        facts: ModelFacts,
        mesh: Mesh,
        *,
        seed: int,
        micro_batch_size: int,
        prefetch_steps: int = 1,
    ) -> None:
        self._planner, self._source, self._facts, self._mesh = planner, source, facts, mesh
        self._seed, self._micro_batch_size = seed, micro_batch_size
        self._prefetch_steps = prefetch_steps
        self._plans: deque[StepPlan] = deque()

    @property
    def empty(self) -> TextCondition:
        """Condition of the empty prompt, with B = 1."""
        return self._source.empty

    def load(self, step: int) -> Batch:
        """This rank's part of ``step``, on the mesh's device.

        A collective over the ranks of one model: all call it for the same steps, in order.

        Raises:
            DataError: The data cannot be read at all (on this rank or another of its model).
        """
        self._plan_ahead(1)
        plan = self._plans.popleft()
        if plan.step != step:
            raise ValueError(f"step {step} was asked for, but the next is {plan.step}")
        # Before the wait for this step: the threads then go on while this one is encoded.
        self._plan_ahead(self._prefetch_steps)
        parts = self._source.rows(plan)
        size = self._micro_batch_size
        microbatches: list[MicroBatch] = []
        for rows, slots_B in zip(parts, plan.slots_B.split(size), strict=True):
            noise_BN = normal(
                self._seed,
                Purpose.VAE_POSTERIOR,
                step,
                slots_B,
                rows.mean_BCHW[0].numel(),
                device=self._mesh.device,
            )
            noise_BCHW = noise_BN.view(rows.mean_BCHW.shape)
            raw_BCHW = sample_latents(rows.mean_BCHW, rows.logvar_BCHW, noise_BCHW)
            microbatches.append(
                MicroBatch(
                    step=step,
                    slots_B=slots_B,
                    clean_BCHW=self._facts.normalise(raw_BCHW),
                    prompt=rows.prompt,
                    empty=self.empty,
                    weight_B=(rows.bad_B == 0).float().to(self._mesh.device),
                )
            )
        codes = torch.cat([rows.bad_B for rows in parts]).long()
        bad_K = torch.bincount(codes, minlength=1 + len(BAD_KINDS))[1:]
        return Batch(microbatches, bad_K, plan)

    def close(self) -> None:
        """Stop the threads; what they read ahead is dropped."""
        self._source.close()
        self._plans.clear()

    def _plan_ahead(self, steps: int) -> None:
        while len(self._plans) < steps:
            plan = self._planner.next()
            self._plans.append(plan)
            self._source.prefetch(plan)
