"""Exposure bias: how far a model drifts when it samples, against the path it was trained on.

A held-out sample z0 and a noise z1 name an ideal path z_sigma = (1 - sigma) z0 + sigma z1, along
which the velocity is z1 - z0. Two kinds of path are compared with it, on the sampler's levels:

- *excursions*: from every ideal state, a few guided steps of the sampler. The state reached has a
  distance from the ideal one of its level, and the velocity that leads back to the sample is
  (z - z0) / sigma. The conditional velocity's distance from that, less its distance from z1 - z0 at
  the ideal state, is the exposure gap; it is reported times sigma. The response says how much of
  the way off shows in the clean estimate: with d the state's difference from the ideal one and D
  that of the estimates z - sigma v, it is <D, d> / <d, d>. Guidance g makes of a conditional
  response c and an unprompted one u the response u + g (c - u).
- *the whole way* from pure noise. It ends at another sample than z0, so only what needs no pairing
  is kept: means and covariances of the channels. An exact velocity field without guidance carries
  the law of the ideal states along, so here the ideal states are the truth.

Distances are root mean squares over a sample's elements, in units of normalised latents. Noise is
``start_noise`` of the sample's number: the same for all models, so their differences are paired.

Source of the velocity that leads back: SOAR, arXiv 2604.12617.

Legend: N samples, B samples of one pass, C/H/W latent channels, height, width, P places (H x W), G
noise levels (K steps and the end), J horizons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.passes import ModelInput, TextCondition
from soar_mega.sampling.generate import ModelFunction, sampler_sigmas, start_noise

HORIZONS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Moments:
    """Means over the places of each sample, of the channels and of their products."""

    first_GNC: Tensor
    second_GNCC: Tensor

    @staticmethod
    def empty(levels: int, samples: int, channels: int) -> Moments:
        """All NaN."""
        return Moments(_nan(levels, samples, channels), _nan(levels, samples, channels, channels))

    def put(self, level: int, part: slice, states_BCHW: Tensor) -> None:
        """Set those of some samples."""
        flat_BCP = states_BCHW.double().flatten(2)
        self.first_GNC[level, part] = flat_BCP.mean(dim=-1).cpu()
        products_BCC = flat_BCP @ flat_BCP.transpose(1, 2) / flat_BCP.shape[-1]
        self.second_GNCC[level, part] = products_BCC.cpu()

    @property
    def square_GN(self) -> Tensor:
        """Mean square of each sample's elements."""
        return self.second_GNCC.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


@dataclass(frozen=True)
class Measurement:
    """What one model did with each sample; fp64 on the CPU, NaN where there is nothing.

    Attributes:
        sigmas: The G noise levels, falling; the last is 0.
        horizons: Steps of the excursions that were looked at.
        guidance_scale: The sampler's.
        drift_JGN: Excursions: distance from the ideal state on arrival at a level.
        own_error_JGN: Conditional velocity against (z - z0) / sigma there; none at sigma = 0.
        ideal_error_GN: Conditional velocity against z1 - z0 at the ideal state.
        change_JGN: On arrival at a level, mean over elements of D d for the conditional clean
            estimate; none at sigma = 0. The response is that over the drift's square.
        unprompted_change_JGN: For the unprompted one; none without guidance, and none for
            excursions of the longest horizon, which end there.
        states: On the whole way from noise.
        ideal_states: On the ideal path.
        clean_square_GN: Mean square of the clean estimate z - sigma v on the whole way, v being
            what the sampler follows; at sigma = 0 of the state.
        ideal_clean_square_GN: The same of the conditional estimate at ideal states.
    """

    sigmas: tuple[float, ...]
    horizons: tuple[int, ...]
    guidance_scale: float
    drift_JGN: Tensor
    own_error_JGN: Tensor
    ideal_error_GN: Tensor
    change_JGN: Tensor
    unprompted_change_JGN: Tensor
    states: Moments
    ideal_states: Moments
    clean_square_GN: Tensor
    ideal_clean_square_GN: Tensor


@torch.no_grad()
def measure(
    model: ModelFunction,
    prompts: TextCondition,
    empty: TextCondition,
    scheduler_folder: Path | str,
    *,
    clean_NCHW: Tensor,
    num_inference_steps: int = 28,
    guidance_scale: float = 4.5,
    horizons: Sequence[int] = HORIZONS,
    batch_size: int | None = None,
) -> Measurement:
    """Follow the sampler from noise and from every ideal state; the same numbers at each call.

    A sample costs about 2 K (max(horizons) + 1.5) forwards, without guidance half of that.

    Args:
        model: As for ``generate``; every rank that holds a part of the model calls ``measure``.
        prompts: Condition of each sample's caption, N rows.
        empty: Condition of the empty prompt, one row.
        scheduler_folder: As for ``generate``.
        clean_NCHW: Held-out clean latents, shifted and scaled, on the model's device; the states
            have their dtype.
        num_inference_steps: K.
        guidance_scale: At most 1 means no guidance, as for ``generate``.
        horizons: Numbers of steps, rising; those above K are left out.
        batch_size: Samples of one pass through the model; None: all.

    Raises:
        ValueError: Fewer than two samples, prompts of another number, or a number out of range.
    """
    count, size = len(clean_NCHW), len(clean_NCHW) if batch_size is None else batch_size
    if count < 2 or len(prompts.text_BTE) != count or len(empty.text_BTE) != 1:
        raise ValueError(
            f"{count} samples, {len(prompts.text_BTE)} prompts and {len(empty.text_BTE)} empty "
            "prompts: at least two samples, one prompt each and one empty prompt are needed"
        )
    if size < 1:
        raise ValueError(f"batch size is {size}: it must be at least 1")
    if not horizons or list(horizons) != sorted({*horizons}) or horizons[0] < 1:
        raise ValueError(f"horizons are {tuple(horizons)}: they must rise, from 1 or more")
    sigmas = sampler_sigmas(scheduler_folder, num_inference_steps)
    kept = tuple(j for j in horizons if j <= num_inference_steps)
    G, J, C = len(sigmas), len(kept), clean_NCHW.shape[1]
    result = Measurement(
        sigmas=tuple(sigmas),
        horizons=kept,
        guidance_scale=guidance_scale,
        drift_JGN=_nan(J, G, count),
        own_error_JGN=_nan(J, G, count),
        ideal_error_GN=_nan(G, count),
        change_JGN=_nan(J, G, count),
        unprompted_change_JGN=_nan(J, G, count),
        states=Moments.empty(G, count, C),
        ideal_states=Moments.empty(G, count, C),
        clean_square_GN=_nan(G, count),
        ideal_clean_square_GN=_nan(G, count),
    )
    shape_CHW = (C, clean_NCHW.shape[2], clean_NCHW.shape[3])
    noise_NCHW = start_noise(range(count), shape_CHW, clean_NCHW.device).to(clean_NCHW.dtype)
    for start in range(0, count, size):
        part = slice(start, start + size)
        condition = TextCondition(prompts.text_BTE[part], prompts.pooled_BV[part])
        velocities = _Velocities(model, condition, empty, guidance_scale)
        _follow(result, part, velocities, clean_NCHW[part], noise_NCHW[part])
    return result


def _follow(
    result: Measurement,
    part: slice,
    velocities: _Velocities,
    clean_BCHW: Tensor,
    noise_BCHW: Tensor,
) -> None:
    """Fill in the samples of ``part``: one sweep over the levels with all paths side by side."""
    longest = result.horizons[-1]
    whole_BCHW = noise_BCHW
    excursions: list[Tensor] = []
    for g, sigma in enumerate(result.sigmas):
        ideal_BCHW = (1 - sigma) * clean_BCHW + sigma * noise_BCHW
        excursions = [ideal_BCHW, *excursions]  # the one at j has made j steps
        due = [(row, j) for row, j in enumerate(result.horizons) if j < len(excursions)]
        for row, j in due:
            result.drift_JGN[row, g, part] = _square(excursions[j] - ideal_BCHW).sqrt()
        result.states.put(g, part, whole_BCHW)
        result.ideal_states.put(g, part, ideal_BCHW)
        if sigma == 0:
            result.clean_square_GN[g, part] = _square(whole_BCHW)
            result.ideal_clean_square_GN[g, part] = _square(clean_BCHW)
            return
        going, done = [whole_BCHW, *excursions[:longest]], excursions[longest:]
        plain, free, guided = velocities([*going, *done], sigma, unguided=len(done))
        for row, j in due:
            back_BCHW = (excursions[j] - clean_BCHW) / sigma
            result.own_error_JGN[row, g, part] = _square(plain[1 + j] - back_BCHW).sqrt()
            off_BCHW = excursions[j] - ideal_BCHW
            for changes_JGN, found in (
                (result.change_JGN, plain),
                (result.unprompted_change_JGN, free),
            ):
                if 1 + j < len(found):
                    change_BCHW = off_BCHW - sigma * (found[1 + j] - found[1])
                    product_BCHW = change_BCHW.double() * off_BCHW.double()
                    changes_JGN[row, g, part] = product_BCHW.mean(dim=(1, 2, 3)).cpu()
        straight_BCHW = noise_BCHW - clean_BCHW
        result.ideal_error_GN[g, part] = _square(plain[1] - straight_BCHW).sqrt()
        result.clean_square_GN[g, part] = _square(whole_BCHW - sigma * guided[0])
        result.ideal_clean_square_GN[g, part] = _square(ideal_BCHW - sigma * plain[1])
        step = result.sigmas[g + 1] - sigma
        whole_BCHW, *excursions = [z + step * v for z, v in zip(going, guided, strict=True)]


class _Velocities:
    """Conditional and guided velocities of some samples in several states of one noise level."""

    def __init__(
        self, model: ModelFunction, condition: TextCondition, empty: TextCondition, scale: float
    ) -> None:
        rows = len(condition.text_BTE)
        self._model, self._scale, self._condition = model, scale, condition
        self._empty = TextCondition(
            empty.text_BTE.expand(rows, -1, -1), empty.pooled_BV.expand(rows, -1)
        )

    def __call__(
        self, states: Sequence[Tensor], sigma: float, *, unguided: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """All conditional ones; unprompted and guided ones of all states but the last ``unguided``.

        There are no unprompted ones without guidance.
        """
        guided = len(states) - unguided
        timestep_B = states[0].new_full((len(states[0]),), 1000 * sigma)
        inputs = [ModelInput(state, timestep_B, self._condition) for state in states]
        if self._scale > 1:
            inputs += [ModelInput(state, timestep_B, self._empty) for state in states[:guided]]
        found = [v.to(states[0].dtype) for v in self._model(inputs)]
        plain, free = found[: len(states)], found[len(states) :]
        if self._scale <= 1:
            return plain, [], plain[:guided]
        pairs = zip(plain, free, strict=False)
        return plain, free, [u + self._scale * (v - u) for v, u in pairs]


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


def _square(values_BCHW: Tensor) -> Tensor:
    """Mean square of each sample's elements, (B,) fp64 on the CPU."""
    return values_BCHW.double().square().mean(dim=(1, 2, 3)).cpu()
