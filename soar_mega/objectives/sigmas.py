"""Noise levels: the density of t, the grid of sigma, and the weight of a loss term.

t = 1 is noise. (diffusers' training script indexes its descending table by u, so its u is 1 - t.)
Everything here is one number a sample and is worked out in fp64 where the slots lie, normally the
host; ``SigmaGrid`` rounds a sigma once to the working precision, and whatever is built from it uses
the rounded value.

Legend: B samples; other dimensions pass through.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from soar_mega import rng
from soar_mega.objectives.settings import TRAIN_TIMESTEPS
from soar_mega.rng import Purpose


def shift_sigma(t: Tensor, shift: float) -> Tensor:
    """sigma(t) = s t / (1 + (s - 1) t), for t in [0, 1]."""
    return shift * t / (1 + (shift - 1) * t)


class SigmaGrid:
    """From t to the sigma in use.

    Args:
        kind: ``scheduler``: the entry floor((1 - t) 1000) of the table of 1000 shifted sigmas that
            diffusers' FlowMatchEulerDiscreteScheduler holds; ``continuous``: sigma(t) itself.
        shift: The scheduler's shift, above 0 (3.0 for the SD3 family).
        dtype: Working precision.
    """

    def __init__(self, kind: str, shift: float, dtype: torch.dtype) -> None:
        if not shift > 0 or not math.isfinite(shift):
            raise ValueError(f"objective.shift = {shift} must be a finite number above 0")
        self.kind = kind
        self.shift = shift
        self.dtype = dtype
        descending = torch.arange(TRAIN_TIMESTEPS, 0, -1, dtype=dtype) / TRAIN_TIMESTEPS
        self.table = shift_sigma(descending, shift)  # in the dtype, so the bits are the scheduler's

    def sigma(self, t: Tensor) -> Tensor:
        """Sigma of t, both fp64 and of one shape; the value is exact in the working precision."""
        if self.kind == "continuous":
            return self.round(shift_sigma(t, self.shift))
        index = ((1 - t) * TRAIN_TIMESTEPS).floor().long().clamp(0, TRAIN_TIMESTEPS - 1)
        return self.table.to(t.device)[index].double()

    def round(self, sigma: Tensor) -> Tensor:
        """The nearest value that the working precision holds, as fp64."""
        return sigma.to(self.dtype).double()


def draw_t(
    scheme: str,
    seed: int,
    step: int,
    slots_B: Tensor,
    *,
    logit_mean: float,
    logit_std: float,
    mode_scale: float,
    draw: int = 0,
) -> Tensor:
    """t of each slot from the scheme's density, (B,) fp64 in [0, 1].

    ``logit_normal`` is sigmoid(mean + std n), ``mode`` the SD3 paper's heavy-tailed density; the
    other schemes change the weight only and leave t uniform. ``draw`` numbers independent draws.
    """
    if scheme == "logit_normal":
        n = rng.normal(seed, Purpose.TIMESTEP, step, slots_B, 1, index=draw)[:, 0].double()
        return _whole_vectors(torch.sigmoid, logit_mean + logit_std * n)
    u = rng.uniform(seed, Purpose.TIMESTEP, step, slots_B, 1, index=draw)[:, 0].double()
    if scheme == "mode":
        bend = _whole_vectors(torch.cos, math.pi / 2 * u).square() - 1 + u
        return (1 - u - mode_scale * bend).clamp(0, 1)
    return u


def _whole_vectors(function: Callable[[Tensor], Tensor], x_B: Tensor) -> Tensor:
    """``function`` of each element, the same bits however many there are.

    On a CPU torch takes the last few elements, which fill no vector register, through another
    implementation: on some processors a sigmoid then differs in its last bit with the size of the
    microbatch. 64 numbers are a multiple of every register, unrolled or not.
    """
    filled = torch.cat([x_B, x_B.new_zeros(-len(x_B) % 64)])
    return function(filled)[: len(x_B)]


def loss_weight(scheme: str, sigma: Tensor, floor: float) -> Tensor:
    """w(max(sigma, floor)), fp64, as diffusers' ``compute_loss_weighting_for_sd3`` has it."""
    sigma = sigma.clamp_min(floor)
    if scheme == "sigma_sqrt":
        return sigma**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)
