"""What a step is made of: passes over microbatches.

A pass is one trip of one microbatch through the whole model, with or without gradient. An objective
declares its passes and makes their inputs (first pipeline stage) and consumes their outputs (last
pipeline stage); a schedule orders them; an executor runs them. This module holds the words all of
them share and imports nothing of the project.

Legend: B samples of the microbatch, S states in a pass (1, or the auxiliary states grouped into one
pass), C/H/W latent channels, height, width, T text tokens, E text embedding width, V pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """One trip of a microbatch through the model.

    Attributes:
        name: Unique within the objective, for example ``base``, ``rollout``, ``aux0``.
        kind: ``base``, ``rollout`` or ``aux``: what a schedule or a picture groups by.
        grad: Whether a backward follows; a pass without keeps no graph and no activations.
        after: Names of the passes of the same microbatch that must have left the last stage before
            this one may enter the first.
        states: How many states a sample contributes: the pass runs on ``states * B`` rows.
        first: Index of the first auxiliary state (kind ``aux`` only).
    """

    name: str
    kind: str
    grad: bool
    after: tuple[str, ...] = ()
    states: int = 1
    first: int = 0


@dataclass(frozen=True)
class TextCondition:
    """Text embeddings as diffusers' Stable Diffusion 3 pipeline builds them."""

    text_BTE: Tensor
    pooled_BV: Tensor

    def repeat(self, states: int) -> TextCondition:
        """The condition for each of ``states`` states, state-major (row = state * B + sample)."""
        if states == 1:
            return self
        return TextCondition(self.text_BTE.repeat(states, 1, 1), self.pooled_BV.repeat(states, 1))


@dataclass(frozen=True)
class MicroBatch:
    """Some slots of one global batch, on the device, ready for the model.

    Attributes:
        step: Training step, from 0; part of every random draw's address.
        slots_B: int64 positions in the global batch (CPU tensor).
        clean_BCHW: Clean latents z0, fp32, already shifted and scaled.
        prompt: Conditions of the captions.
        empty: Condition of the empty prompt, with B = 1.
        weight_B: fp32, 1 for a real sample and 0 for a placeholder.
    """

    step: int
    slots_B: Tensor
    clean_BCHW: Tensor
    prompt: TextCondition
    empty: TextCondition
    weight_B: Tensor


@dataclass(frozen=True)
class ModelInput:
    """What enters the first stage; rows are ``states * B``, state-major.

    ``latent_BCHW`` comes in the objective's working precision (fp32); the model casts it.
    ``timestep_B`` is exactly 1000 sigma in the same precision.
    """

    latent_BCHW: Tensor
    timestep_B: Tensor
    condition: TextCondition


class Objective(Protocol):
    """What the executor asks of an objective. ``state`` is the objective's own per-microbatch
    record; both ends of a pipeline build it from the same microbatch and draw the same numbers."""

    def passes(self) -> tuple[Pass, ...]:
        """The passes of every microbatch, in an order one process can run."""

    def begin(self, micro: MicroBatch) -> Any:
        """Start a microbatch: draws, base state, loss terms to come."""

    def count(self, micro: MicroBatch) -> Tensor:
        """``[base terms, auxiliary terms]`` of this microbatch, fp64, known before any forward."""

    def normaliser(self, counts: Tensor) -> Tensor:
        """The loss denominator (0-d fp32) from counts summed over the global batch."""

    def make_input(self, p: Pass, state: Any) -> ModelInput:
        """First stage: the input of pass ``p``."""

    def take_output(
        self, p: Pass, state: Any, velocity_BCHW: Tensor, normaliser: Tensor
    ) -> Tensor | None:
        """Last stage: the loss to run backward from (already divided by ``normaliser``) for a pass
        with gradient, None otherwise; keeps what later passes need, detached."""

    def hand_over(self, state: Any) -> Tensor:
        """Last stage, after the passes an auxiliary pass waits for: the guided velocity to send."""

    def receive(self, state: Any, guided_BCHW: Tensor) -> None:
        """First stage: take the guided velocity."""

    def terms(self, state: Any) -> LossTerms:
        """Last stage, after the last pass: the unweighted per-slot loss terms for the metrics."""


@dataclass(frozen=True)
class LossTerms:
    """Per-slot loss terms of one microbatch, for reporting in one canonical order.

    Attributes:
        base_B: w(sigma0) * mean squared error of the base pass, fp64.
        aux_KB: The same for each auxiliary state K = M * N (path-major), fp64; 0 rows without.
        base_counted_B: 1 where the base term counts, else 0, fp64.
        aux_counted_KB: The same for auxiliary terms.
        sigma_B: Noise level of the base state, for the loss by timestep bin.
    """

    base_B: Tensor
    aux_KB: Tensor
    base_counted_B: Tensor
    aux_counted_KB: Tensor
    sigma_B: Tensor


def no_aux(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """The empty ``aux_KB`` of an objective without auxiliary states."""
    return torch.zeros(0, batch, dtype=torch.float64, device=device)
