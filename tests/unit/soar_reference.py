"""A plain SOAR step in fp64, written from the method's definition and for the tests only.

One sample, one path, one state at a time, in Python numbers where there is one number; every graph
is kept until the caller runs one backward. It shares the random draws with the package and nothing
else. Beside it are the small model and the settings that the tests run it on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from soar_mega import rng
from soar_mega.passes import MicroBatch, ModelInput, TextCondition
from soar_mega.rng import Purpose

CHANNELS, HEIGHT, WIDTH, TOKENS, TEXT, POOLED = 3, 2, 4, 5, 4, 3
SHIFT, SEED, STEP = 3.0, 1234, 7


def settings(**changes: Any) -> Any:
    """The ``objective`` section's defaults, with changes."""
    values: dict[str, Any] = {
        "name": "soar",
        "weighting_scheme": "logit_normal",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
        "sigma_grid": "scheduler",
        "cond_dropout_rate": 0.3,
        "min_aux_sigma": 0.00299,
        "lambda_aux": 0.7,
        "aux_states": "rollout",
        "num_rollout_paths": 1,
        "trajectory_length": 2,
        "num_sampling_steps": 40,
        "cfg_scale_sampling": 4.5,
        "sde_rollout_type": "sde",
        "sde_noise_scale": 0.5,
        "sigma_upper_ratio": None,
        "aux_group_size": 1,
        "reuse_base_forward": True,
    }
    assert changes.keys() <= values.keys(), changes.keys() - values.keys()
    return SimpleNamespace(**(values | changes))


@dataclass
class Sample:
    """One slot of a global batch."""

    slot: int
    clean: Tensor
    text: Tensor
    pooled: Tensor
    real: bool = True


def make_samples(count: int) -> tuple[list[Sample], TextCondition]:
    """Some samples in fp64, at slots that do not start at 0, and the empty prompt's condition."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    samples = [
        Sample(3 + g, draw(CHANNELS, HEIGHT, WIDTH), draw(TOKENS, TEXT), draw(POOLED))
        for g in range(count)
    ]
    return samples, TextCondition(draw(1, TOKENS, TEXT), draw(1, POOLED))


def make_micro(
    samples: list[Sample], empty: TextCondition, dtype: torch.dtype, step: int = STEP
) -> MicroBatch:
    return MicroBatch(
        step=step,
        slots_B=torch.tensor([s.slot for s in samples]),
        clean_BCHW=torch.stack([s.clean for s in samples]).to(dtype),
        prompt=TextCondition(
            torch.stack([s.text for s in samples]).to(dtype),
            torch.stack([s.pooled for s in samples]).to(dtype),
        ),
        empty=TextCondition(empty.text_BTE.to(dtype), empty.pooled_BV.to(dtype)),
        weight_B=torch.tensor([float(s.real) for s in samples]),
    )


class SmallModel(nn.Module):
    """A smooth velocity field of everything a model is given, each sample on its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        hidden = 7

        def weight(*shape: int) -> nn.Parameter:
            value = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(value / shape[-1] ** 0.5)

        self.inward = weight(hidden, CHANNELS)
        self.text = weight(hidden, TEXT)
        self.pooled = weight(hidden, POOLED)
        self.time = weight(hidden, 2)
        self.outward = weight(CHANNELS, hidden)

    def forward(self, x: ModelInput) -> Tensor:
        sigma = x.timestep_B / 1000
        time = torch.stack([sigma, torch.cos(3 * sigma)], dim=-1) @ self.time.T
        text = torch.tanh(x.condition.text_BTE @ self.text.T).mean(1)
        given = time + text + x.condition.pooled_BV @ self.pooled.T
        hidden = torch.einsum("hc,bcxy->bhxy", self.inward, x.latent_BCHW)
        return torch.einsum(
            "ch,bhxy->bcxy", self.outward, torch.tanh(hidden + given[..., None, None])
        )


@dataclass
class Reference:
    """What a step came to. ``base`` is (sample,), ``aux`` (path-major state, sample)."""

    loss: Tensor
    base: Tensor
    aux: Tensor
    base_terms: int
    aux_terms: int
    timesteps: list[float] = field(default_factory=list)


def reference_step(
    model: Callable[[ModelInput], Tensor],
    config: Any,
    samples: list[Sample],
    empty: TextCondition,
    *,
    t0: Callable[[int], float] | None = None,
    shift: float = SHIFT,
    seed: int = SEED,
    step: int = STEP,
) -> Reference:
    """The loss of one step; ``t0`` replaces the draw of t by a function of the slot."""
    base_losses: list[Tensor] = []
    aux_losses: list[list[Tensor]] = []
    timesteps: list[float] = []
    base_terms = aux_terms = 0
    total = torch.zeros((), dtype=torch.float64)

    def velocity(z: Tensor, sigma: float, text: Tensor, pooled: Tensor) -> Tensor:
        timestep = torch.tensor([1000 * sigma], dtype=torch.float64)
        return model(ModelInput(z[None], timestep, TextCondition(text[None], pooled[None])))[0]

    for sample in samples:
        shape, numel = sample.clean.shape, sample.clean.numel()
        slot = torch.tensor([sample.slot])

        def number(purpose: Purpose, slot: Tensor = slot, **where: Any) -> float:
            return float(rng.uniform(seed, purpose, step, slot, 1, **where))

        def field_(
            purpose: Purpose,
            slot: Tensor = slot,
            numel: int = numel,
            shape: torch.Size = shape,
            **where: Any,
        ) -> Tensor:
            return rng.normal(seed, purpose, step, slot, numel, **where).double().view(shape)

        z0, z1 = sample.clean, field_(Purpose.NOISE)
        text, pooled = sample.text, sample.pooled
        if number(Purpose.PROMPT_DROPOUT) < config.cond_dropout_rate:
            text, pooled = empty.text_BTE[0], empty.pooled_BV[0]

        # 1. Base
        t_0 = t0(sample.slot) if t0 else _density(config, seed, step, slot)
        sigma0 = _sigma(config, t_0, shift)
        z = (1 - sigma0) * z0 + sigma0 * z1
        v_c = velocity(z, sigma0, text, pooled)
        base_losses.append(_weight(config, sigma0) * ((v_c - (z1 - z0)) ** 2).mean())
        timesteps.append(1000 * sigma0)
        if sample.real:
            base_terms += 1
            total = total + base_losses[-1]
        if config.lambda_aux == 0 or config.trajectory_length == 0:
            continue

        # 2. Rollout
        t_1 = max(t_0 - 1 / config.num_sampling_steps, 0.0)
        sigma1 = _sigma(config, t_1, shift)
        with torch.no_grad():
            v_u = velocity(z, sigma0, empty.text_BTE[0], empty.pooled_BV[0])
        v_cfg = (v_u + config.cfg_scale_sampling * (v_c - v_u)).detach()

        losses: list[Tensor] = []
        for m in range(config.num_rollout_paths):
            # 3. Path
            if m == 0:
                z_r = z + (sigma1 - sigma0) * v_cfg
            else:
                eps = field_(Purpose.ROLLOUT_NOISE, path=m)
                z_r = _noisy_path(config, z, v_cfg, eps, sigma0, sigma1, shift)
            for k in range(config.trajectory_length):
                # 4. Auxiliary state
                lower, upper = max(sigma1, config.min_aux_sigma), 1.0
                if config.sigma_upper_ratio is not None:
                    upper = max(min(config.sigma_upper_ratio * sigma0, 1.0), lower)
                sigma_k = lower + number(Purpose.AUX_SIGMA, path=m, index=k) * (upper - lower)
                a = 0.0 if sigma1 == 1 else (sigma_k - sigma1) / (1 - sigma1)
                if config.aux_states == "ideal":
                    z_r = (1 - sigma1) * z0 + sigma1 * z1
                z_k = (1 - a) * z_r + a * z1
                if config.aux_states == "independent":
                    draw = m * config.trajectory_length + k + 1
                    sigma_k = _sigma(config, _density(config, seed, step, slot, draw), shift)
                    z_k = (1 - sigma_k) * z0 + sigma_k * field_(Purpose.NOISE, index=draw)
                # 5. Correction
                v_corr = (z_k - z0) / sigma_k
                error = velocity(z_k, sigma_k, text, pooled) - v_corr
                loss = _weight(config, sigma_k) * (error**2).mean()
                timesteps.append(1000 * sigma_k)
                dead = m > 0 and t_1 == 0 and config.aux_states == "rollout"
                if not sample.real or dead:
                    loss = torch.zeros((), dtype=torch.float64)
                else:
                    aux_terms += 1
                    total = total + config.lambda_aux * loss
                losses.append(loss)
        aux_losses.append(losses)

    denominator = base_terms + config.lambda_aux * aux_terms
    return Reference(
        loss=total / denominator,
        base=torch.stack(base_losses).detach(),
        aux=_table(aux_losses),
        base_terms=base_terms,
        aux_terms=aux_terms,
        timesteps=timesteps,
    )


def _table(losses: list[list[Tensor]]) -> Tensor:
    """(state, sample) of the losses kept sample by sample."""
    rows = [[float(loss.detach()) for loss in row] for row in losses]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(rows[0]) if rows else 0).mT


def _density(config: Any, seed: int, step: int, slot: Tensor, draw: int = 0) -> float:
    if config.weighting_scheme == "logit_normal":
        n = float(rng.normal(seed, Purpose.TIMESTEP, step, slot, 1, index=draw))
        return 1 / (1 + math.exp(-(config.logit_mean + config.logit_std * n)))
    u = float(rng.uniform(seed, Purpose.TIMESTEP, step, slot, 1, index=draw))
    if config.weighting_scheme == "mode":
        return 1 - u - config.mode_scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return u


def _sigma(config: Any, t: float, shift: float) -> float:
    if config.sigma_grid == "scheduler":
        index = min(max(math.floor((1 - t) * 1000), 0), 999)
        t = (1000 - index) / 1000
    return shift * t / (1 + (shift - 1) * t)


def _weight(config: Any, sigma: float) -> float:
    sigma = max(sigma, config.min_aux_sigma)
    if config.weighting_scheme == "sigma_sqrt":
        return 1 / sigma**2
    if config.weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return 1.0


def _noisy_path(
    config: Any, z: Tensor, v: Tensor, eps: Tensor, sigma0: float, sigma1: float, shift: float
) -> Tensor:
    c, dsigma = config.sde_noise_scale, sigma1 - sigma0
    x0 = z - sigma0 * v
    if config.sde_rollout_type == "simple":
        return z + dsigma * v + c * math.sqrt(abs(dsigma)) * eps
    if config.sde_rollout_type == "sde":
        return (1 - sigma1) * x0 + sigma1 * eps
    if config.sde_rollout_type == "cps":
        x1 = z + (1 - sigma0) * v
        s = sigma1 * math.sin(c * math.pi / 2)
        return (1 - sigma1) * x0 + math.sqrt(max(sigma1**2 - s**2, 0)) * x1 + s * eps
    second = shift * 0.999 / (1 + (shift - 1) * 0.999)
    q = 1 - min(sigma0, second)
    s = math.sqrt(c**2 * sigma0 / q)
    half = c**2 / (2 * q)
    drift = z * (1 + half * dsigma) + v * (1 + half * (1 - sigma0)) * dsigma
    return drift + s * math.sqrt(-dsigma) * eps
