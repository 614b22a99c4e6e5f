"""Flow matching: the objective of pretraining and of supervised fine-tuning.

One pass a microbatch, ``base``: draw sigma and the noise endpoint z1, show the model
z = (1 - sigma) z0 + sigma z1, and regress its output on z1 - z0. SOAR adds passes to this one.

The numbers a sample needs (sigma, weight, flags) are drawn and worked out in fp64 where the slots
lie, the host, and go to the device in one copy: nothing here waits for the device, and both ends of
a pipeline get the same numbers.

Legend: B samples, S states of a pass, K all auxiliary states of a sample, C/H/W latent channels,
height, width, T text tokens, E text embedding width, V pooled width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from soar_mega import rng
from soar_mega.objectives.settings import (
    TRAIN_TIMESTEPS,
    FlowMatchingSettings,
    check_flow_matching,
)
from soar_mega.objectives.sigmas import SigmaGrid, draw_t, loss_weight
from soar_mega.passes import LossTerms, MicroBatch, ModelInput, Pass, TextCondition, no_aux
from soar_mega.rng import Purpose


@dataclass
class FlowState:
    """One microbatch on its way.

    Attributes:
        micro: The microbatch.
        clean_BCHW: z0; zeros for a placeholder, whatever its latents hold.
        noise_BCHW: z1.
        sigma_B: Sigma of the base state.
        weight_B: w(sigma) of the base loss.
        counted_B: bool, False for a placeholder.
        empty_prompt_B: bool, True where the prompt is dropped.
        condition: The prompts after dropout, made when first asked for.
        base_term_B: The base loss of each slot, fp64, after its pass.
    """

    micro: MicroBatch
    clean_BCHW: Tensor
    noise_BCHW: Tensor
    sigma_B: Tensor
    weight_B: Tensor
    counted_B: Tensor
    empty_prompt_B: Tensor
    condition: TextCondition | None = field(default=None, repr=False)
    base_term_B: Tensor | None = None


class FlowMatching:
    """Flow matching of a microbatch; implements ``passes.Objective``.

    Args:
        config: The settings, by attribute.
        shift: Shift of the sigma schedule.
        seed: Run seed; every draw hangs on it.
        dtype: Working precision of sigmas, states, targets and losses.

    Raises:
        ValueError: A setting is outside its range.
    """

    base = Pass("base", "base", grad=True)

    def __init__(
        self,
        config: FlowMatchingSettings,
        *,
        shift: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_flow_matching(config)
        self.config = config
        self.seed = seed
        self.dtype = dtype
        self.grid = SigmaGrid(config.sigma_grid, shift, dtype)

    def passes(self) -> tuple[Pass, ...]:
        """``base`` alone."""
        return (self.base,)

    def draw_t0(self, step: int, slots_B: Tensor, draw: int = 0) -> Tensor:
        """t of the base state (or of a further ``draw``), (B,) fp64 in [0, 1], 1 being noise."""
        config = self.config
        return draw_t(
            config.weighting_scheme,
            self.seed,
            step,
            slots_B,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            draw=draw,
        )

    def draw_noise(self, micro: MicroBatch, draw: int = 0) -> Tensor:
        """z1 of the base state (or of a further ``draw``), (B, C, H, W) in working precision."""
        clean_BCHW = micro.clean_BCHW
        noise = rng.normal(
            self.seed,
            Purpose.NOISE,
            micro.step,
            micro.slots_B,
            math.prod(clean_BCHW.shape[1:]),
            index=draw,
            device=clean_BCHW.device,
        )
        return noise.view_as(clean_BCHW).to(self.dtype)

    def begin(self, micro: MicroBatch) -> FlowState:
        """Draw what the microbatch needs; no text is touched."""
        sigma_B = self.grid.sigma(self.draw_t0(micro.step, micro.slots_B))
        return FlowState(**self._base_fields(micro, sigma_B))

    def count(self, micro: MicroBatch) -> Tensor:
        """``[base terms, 0]``, fp64."""
        base = (micro.weight_B > 0).sum(dtype=torch.float64)
        return torch.stack([base, torch.zeros_like(base)])

    def normaliser(self, counts: Tensor) -> Tensor:
        """The number of base terms in the global batch, or 1 if none; in the working precision."""
        return self._nonzero(counts[0])

    def make_input(self, p: Pass, state: FlowState) -> ModelInput:
        """The noisy latents, their timestep and the prompts after dropout."""
        sigma_B111 = state.sigma_B.view(-1, 1, 1, 1)
        latent_BCHW = (1 - sigma_B111) * state.clean_BCHW + sigma_B111 * state.noise_BCHW
        return ModelInput(latent_BCHW, TRAIN_TIMESTEPS * state.sigma_B, self._condition(state))

    def take_output(
        self, p: Pass, state: FlowState, velocity_BCHW: Tensor, normaliser: Tensor
    ) -> Tensor | None:
        """The microbatch's share of the base loss, 0-d in the working precision."""
        target_BCHW = state.noise_BCHW - state.clean_BCHW
        term_B = self._terms(velocity_BCHW, target_BCHW, state.weight_B, state.counted_B)
        state.base_term_B = term_B.detach().double()
        return term_B.sum() / normaliser

    def hand_over(self, state: Any) -> Tensor:
        """Never asked of flow matching, which has no pass that waits for another."""
        raise RuntimeError("flow matching has no guided velocity to hand over")

    def receive(self, state: Any, guided_BCHW: Tensor) -> None:
        """Never asked of flow matching."""
        raise RuntimeError("flow matching takes no guided velocity")

    def terms(self, state: FlowState) -> LossTerms:
        """The base terms; no auxiliary ones."""
        if state.base_term_B is None:
            raise RuntimeError("the loss terms were asked for before the base pass had its output")
        none = no_aux(len(state.sigma_B), state.sigma_B.device)
        counted_B = state.counted_B.double()
        return LossTerms(state.base_term_B, none, counted_B, none, state.sigma_B)

    def _base_fields(self, micro: MicroBatch, sigma_B: Tensor, *more: Tensor) -> dict[str, Any]:
        device = micro.clean_BCHW.device
        config = self.config
        weight_B = loss_weight(config.weighting_scheme, sigma_B, config.min_aux_sigma)
        chance_B1 = rng.uniform(self.seed, Purpose.PROMPT_DROPOUT, micro.step, micro.slots_B, 1)
        dropped_B = chance_B1[:, 0] < config.cond_dropout_rate
        sigma_B, weight_B, dropped_B = self._to_device([sigma_B, weight_B, dropped_B], device)
        counted_B = micro.weight_B > 0
        # A placeholder may hold anything: masking its loss alone would let NaN * 0 into gradients.
        clean_BCHW = micro.clean_BCHW.to(self.dtype).where(counted_B.view(-1, 1, 1, 1), 0.0)
        return {
            "micro": micro,
            "clean_BCHW": clean_BCHW,
            "noise_BCHW": self.draw_noise(micro),
            "sigma_B": sigma_B,
            "weight_B": weight_B,
            "counted_B": counted_B,
            "empty_prompt_B": (dropped_B > 0) | ~counted_B,
        }

    def _to_device(self, rows: list[Tensor], device: torch.device) -> list[Tensor]:
        """Per-sample numbers, (B,) or (K, B) each, in the working precision, in one copy."""
        flat = [row.reshape(-1, row.shape[-1]).to(self.dtype) for row in rows]
        moved = torch.cat(flat).to(device, non_blocking=True).split([len(row) for row in flat])
        return [part.view(row.shape) for part, row in zip(moved, rows, strict=True)]

    def _condition(self, state: FlowState) -> TextCondition:
        if state.condition is None:
            prompt, empty = state.micro.prompt, state.micro.empty
            dropped_B = state.empty_prompt_B
            state.condition = TextCondition(
                torch.where(dropped_B.view(-1, 1, 1), empty.text_BTE, prompt.text_BTE),
                torch.where(dropped_B.view(-1, 1), empty.pooled_BV, prompt.pooled_BV),
            )
        return state.condition

    def _terms(self, velocity: Tensor, target: Tensor, weight: Tensor, counted: Tensor) -> Tensor:
        """w * mean squared error over C, H, W; exactly 0, with zero gradient, where not counted."""
        error = velocity.to(self.dtype) - target
        error = torch.where(counted[..., None, None, None], error, 0.0)
        return weight * error.square().mean((-3, -2, -1))

    def _nonzero(self, denominator: Tensor) -> Tensor:
        return torch.where(denominator > 0, denominator, 1.0).to(self.dtype)
