"""The published procedure, written plainly on diffusers' model: what ours is measured against.

As published, and as one writes it first: the base forward; the rollout as one call on conditional
and unconditional rows together, which builds a graph that is thrown away; N auxiliary forwards one
after the other; every graph kept until a single backward. Draws are handed in, so that both sides
can be given the same and must then find the same loss.

Legend: B samples, N auxiliary states, C/H/W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.passes import MicroBatch, TextCondition
from soar_mega.training.benchmark_step.load import LEARNING_RATE, MAX_GRAD_NORM, SHIFT, Load
from soar_mega.training.benchmark_step.variants import Variant

GUIDANCE = 4.5
SAMPLING_STEPS = 40
MIN_AUX_SIGMA = 0.00299


@dataclass(frozen=True)
class Draws:
    """The random numbers of a step, fp32 on the device.

    Attributes:
        noise_BCHW: The noise endpoint z1.
        sigma0_B: Noise level of the base state.
        sigma1_B: Where the rollout ends.
        sigma_NB: Noise levels of the auxiliary states; none for SFT.
    """

    noise_BCHW: Tensor
    sigma0_B: Tensor
    sigma1_B: Tensor
    sigma_NB: Tensor


def draw(micro: MicroBatch, states: int) -> Draws:
    """Logit-normal t0 on the scheduler's grid of 1000, sigma_k uniform between sigma1 and 1."""
    clean_BCHW = micro.clean_BCHW
    B, device = len(clean_BCHW), clean_BCHW.device
    t = torch.arange(1000, 0, -1, device=device) / 1000
    table = SHIFT * t / (1 + (SHIFT - 1) * t)
    t0_B = torch.sigmoid(torch.randn(B, device=device))
    t1_B = (t0_B - 1 / SAMPLING_STEPS).clamp(min=0)
    sigma0_B, sigma1_B = (table[((1 - t_B) * 1000).long().clamp(0, 999)] for t_B in (t0_B, t1_B))
    lower_B = sigma1_B.clamp(min=MIN_AUX_SIGMA)
    share_NB = torch.rand(states, B, device=device)
    return Draws(
        torch.randn_like(clean_BCHW), sigma0_B, sigma1_B, lower_B + share_NB * (1 - lower_B)
    )


class ReferenceSide:
    """Model, loss and AdamW with fp32 master weights, on made-up data.

    Args:
        load: What is computed.
        variant: With or without diffusers' gradient checkpointing.

    Attributes:
        model: diffusers' ``SD3Transformer2DModel``.
    """

    def __init__(self, load: Load, variant: Variant) -> None:
        from diffusers import SD3Transformer2DModel

        with torch.device(load.device):
            torch.manual_seed(0)
            model = SD3Transformer2DModel(**load.architecture.to_diffusers())
        # Not diffusers' own `to`, which warns of modules to be kept in fp32: this model has none.
        self.model = torch.nn.Module.to(model, load.torch_dtype).train()
        if variant.activation_checkpointing == "full":
            self.model.enable_gradient_checkpointing()
        self._dtype, self._micro = load.torch_dtype, load.microbatch(variant)
        self._states = load.trajectory_length if load.objective == "soar" else 0
        self._weights: list[Tensor] = list(self.model.parameters())
        self._gradients = _give_gradients(self._weights)
        self._masters: list[Tensor] = self._weights
        self._master_gradients = self._gradients
        self._adam: torch.optim.Optimizer | None = None
        if load.optimizer:
            self._make_optimizer()
        self._zero_gradients()  # written, as on the other side, before memory is looked at

    def _make_optimizer(self) -> None:
        if self._dtype != torch.float32:
            self._masters = [weight.detach().float() for weight in self._weights]
            self._master_gradients = _give_gradients(self._masters)
        self._adam = torch.optim.AdamW(
            self._masters, lr=LEARNING_RATE, weight_decay=1e-4, fused=True
        )
        self._adam.step()  # of zero gradients: makes the moments

    def step(self) -> Tensor:
        """One training step, with draws of its own; the loss, 0-d."""
        self._zero_gradients()
        loss = self.backward(self._micro, draw(self._micro, self._states))
        self._update()
        return loss

    def backward(self, micro: MicroBatch, draws: Draws) -> Tensor:
        """Adds the gradients of a microbatch; the loss, 0-d."""
        z0_BCHW, z1_BCHW = micro.clean_BCHW, draws.noise_BCHW
        sigma0_B111, sigma1_B111 = (s.view(-1, 1, 1, 1) for s in (draws.sigma0_B, draws.sigma1_B))
        z_BCHW = (1 - sigma0_B111) * z0_BCHW + sigma0_B111 * z1_BCHW
        velocity_BCHW = self._velocity(z_BCHW, draws.sigma0_B, micro.prompt)
        losses = [(velocity_BCHW - (z1_BCHW - z0_BCHW)).square().mean()]
        if len(draws.sigma_NB):
            guided_BCHW = self._guided(z_BCHW, draws.sigma0_B, micro).detach()
            rolled_BCHW = z_BCHW + (sigma1_B111 - sigma0_B111) * guided_BCHW
        for sigma_B in draws.sigma_NB:
            sigma_B111 = sigma_B.view(-1, 1, 1, 1)
            share_B111 = (sigma_B111 - sigma1_B111) / (1 - sigma1_B111)
            state_BCHW = (1 - share_B111) * rolled_BCHW + share_B111 * z1_BCHW
            target_BCHW = (state_BCHW - z0_BCHW) / sigma_B111
            velocity_BCHW = self._velocity(state_BCHW, sigma_B, micro.prompt)
            losses.append((velocity_BCHW - target_BCHW).square().mean())
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach()

    def _velocity(self, z_BCHW: Tensor, sigma_B: Tensor, text: TextCondition) -> Tensor:
        out_BCHW: Tensor = self.model(
            z_BCHW.to(self._dtype), text.text_BTE, text.pooled_BV, 1000 * sigma_B, return_dict=False
        )[0]
        return out_BCHW.float()

    def _guided(self, z_BCHW: Tensor, sigma_B: Tensor, micro: MicroBatch) -> Tensor:
        B, prompt, empty = len(z_BCHW), micro.prompt, micro.empty
        both = TextCondition(
            torch.cat([prompt.text_BTE, empty.text_BTE.expand(B, -1, -1)]),
            torch.cat([prompt.pooled_BV, empty.pooled_BV.expand(B, -1)]),
        )
        velocity = self._velocity(z_BCHW.repeat(2, 1, 1, 1), sigma_B.repeat(2), both)
        prompted_BCHW, empty_BCHW = velocity.chunk(2)
        return empty_BCHW + GUIDANCE * (prompted_BCHW - empty_BCHW)

    def _zero_gradients(self) -> None:
        torch._foreach_zero_(self._gradients)

    @torch.no_grad()
    def _update(self) -> None:
        if self._adam is None:
            return
        separate = self._masters is not self._weights
        if separate:
            torch._foreach_copy_(self._master_gradients, self._gradients)
        torch.nn.utils.clip_grad_norm_(self._masters, MAX_GRAD_NORM)
        self._adam.step()
        if separate:
            torch._foreach_copy_(self._weights, self._masters)


def _give_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    """Zero gradients that stay, as the other side's do: every backward adds into them."""
    gradients = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    return gradients
