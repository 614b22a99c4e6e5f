"""The rollout step and the auxiliary states, as coefficients.

Every rollout type is one linear form, so a path costs three numbers a sample:

    z_r = keep z + push v + shake eps

with v the guided velocity and z = (1 - sigma0) z0 + sigma0 z1. An auxiliary state lies between z_r
and the noise endpoint, z_k = (1 - a) z_r + a z1, and its target is (z_k - z0) / sigma_k. What is
worked out is z_k - z0, not z_k: written with u = z1 - z0,

    z_r - z0 = (keep - 1) z0 + keep sigma0 u + push v + shake eps
    z_k - z0 = (1 - a) (z_r - z0) + a u

which loses no digits at small sigma, where the target divides by sigma_k.

Legend: B samples, S states, C/H/W latent channels, height, width. Coefficients are
fp64, one a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.objectives.settings import ROLLOUT_TYPES


@dataclass(frozen=True)
class StepCoefficients:
    """z_r = keep z + push v + shake eps; ``keep_less_one`` is kept apart for its precision."""

    keep_less_one: Tensor
    push: Tensor
    shake: Tensor


def euler_step(sigma0: Tensor, sigma1: Tensor) -> StepCoefficients:
    """Path 0: z + (sigma1 - sigma0) v."""
    zero = torch.zeros_like(sigma0)
    return StepCoefficients(zero, sigma1 - sigma0, zero)


def noisy_step(
    kind: str, sigma0: Tensor, sigma1: Tensor, noise_scale: float, sigma_below_one: float
) -> StepCoefficients:
    """The other paths, d = sigma1 - sigma0 <= 0 and c = ``noise_scale``.

    ``simple``: z + d v + c sqrt(|d|) eps.
    ``sde``, with x0 = z - sigma0 v: (1 - sigma1) x0 + sigma1 eps.
    ``cps``, with also x1 = z + (1 - sigma0) v and s = sigma1 sin(c pi / 2):
    (1 - sigma1) x0 + sqrt(sigma1^2 - s^2) x1 + s eps.
    ``flow_sde``, with q = 1 - min(sigma0, ``sigma_below_one``) and h = c^2 / (2 q):
    z (1 + h d) + v (1 + h (1 - sigma0)) d + c sqrt(sigma0 / q) sqrt(-d) eps.

    Args:
        kind: One of ``ROLLOUT_TYPES``.
        sigma0: Where the step starts.
        sigma1: Where it ends.
        noise_scale: c, at least 0.
        sigma_below_one: Second entry of the sigma table; keeps q above 0.
    """
    d = sigma1 - sigma0
    c = noise_scale
    if kind == "simple":
        return StepCoefficients(torch.zeros_like(d), d, c * d.abs().sqrt())
    if kind == "sde":
        return StepCoefficients(-sigma1, -(1 - sigma1) * sigma0, sigma1)
    if kind == "cps":
        s = sigma1 * math.sin(c * math.pi / 2)
        rest = (sigma1.square() - s.square()).clamp_min(0).sqrt()
        return StepCoefficients(rest - sigma1, rest * (1 - sigma0) - (1 - sigma1) * sigma0, s)
    if kind == "flow_sde":
        q = 1 - sigma0.clamp_max(sigma_below_one)
        h = c * c / (2 * q)
        return StepCoefficients(
            h * d, (1 + h * (1 - sigma0)) * d, c * (sigma0 / q).sqrt() * d.abs().sqrt()
        )
    raise ValueError(f"sde_rollout_type = {kind!r} is not one of {', '.join(ROLLOUT_TYPES)}")


def aux_sigma(
    draw: Tensor, sigma0: Tensor, sigma1: Tensor, floor: float, upper_ratio: float | None
) -> Tensor:
    """sigma_k = lower + draw (upper - lower), fp64.

    lower = max(sigma1, ``floor``); upper = 1, or max(min(r sigma0, 1), lower) with a ratio r.

    Args:
        draw: Uniform in (0, 1), (..., B).
        sigma0: (B,)
        sigma1: (B,)
        floor: ``min_aux_sigma``.
        upper_ratio: ``sigma_upper_ratio``.
    """
    lower = sigma1.clamp_min(floor)
    upper = torch.ones_like(lower)
    if upper_ratio is not None:
        upper = torch.maximum((upper_ratio * sigma0).clamp_max(1), lower)
    return lower + draw * (upper - lower)


def renoise_share(sigma_k: Tensor, sigma1: Tensor) -> Tensor:
    """a = (sigma_k - sigma1) / (1 - sigma1), and 0 where sigma1 = 1."""
    room = 1 - sigma1
    open_ = room > 0
    return torch.where(open_, (sigma_k - sigma1) / torch.where(open_, room, 1.0), 0.0)


def guided_velocity(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, v_u + g (v_c - v_u)."""
    return unconditional + scale * (conditional - unconditional)
