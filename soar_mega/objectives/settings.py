"""What the objectives read of the config, named as in its ``objective`` section, and the rules."""

from __future__ import annotations

import math
from typing import Protocol

from soar_mega import rng

TRAIN_TIMESTEPS = 1000  # entries of the scheduler's table; timestep = 1000 sigma
WEIGHTING_SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
SIGMA_GRIDS = ("scheduler", "continuous")
ROLLOUT_TYPES = ("sde", "simple", "cps", "flow_sde")
AUX_STATES = ("rollout", "ideal", "independent")


class FlowMatchingSettings(Protocol):
    """What flow matching reads. ``shift`` comes apart: the config may leave it to the scheduler."""

    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    sigma_grid: str
    cond_dropout_rate: float
    min_aux_sigma: float


class SoarSettings(FlowMatchingSettings, Protocol):
    """What SOAR reads beyond that."""

    lambda_aux: float
    aux_states: str
    num_rollout_paths: int
    trajectory_length: int
    num_sampling_steps: int
    cfg_scale_sampling: float
    sde_rollout_type: str
    sde_noise_scale: float
    sigma_upper_ratio: float | None
    aux_group_size: int
    reuse_base_forward: bool


def has_aux_terms(config: SoarSettings) -> bool:
    """Whether the settings leave any auxiliary term; without, SOAR is flow matching."""
    return config.lambda_aux > 0 and config.trajectory_length > 0


def check_flow_matching(config: FlowMatchingSettings) -> None:
    """Refuse settings outside their range.

    Raises:
        ValueError: Names the setting, its value and the rule.
    """
    _check(
        config,
        weighting_scheme=(config.weighting_scheme in WEIGHTING_SCHEMES, _any(WEIGHTING_SCHEMES)),
        sigma_grid=(config.sigma_grid in SIGMA_GRIDS, _any(SIGMA_GRIDS)),
        logit_mean=(math.isfinite(config.logit_mean), "finite"),
        logit_std=(0 <= config.logit_std < math.inf, "finite and at least 0"),
        mode_scale=(math.isfinite(config.mode_scale), "finite"),
        cond_dropout_rate=(0 <= config.cond_dropout_rate <= 1, "0 to 1"),
        min_aux_sigma=(
            0 < config.min_aux_sigma < 1,
            "above 0 and below 1: weights and correction targets divide by sigma",
        ),
    )


def check_soar(config: SoarSettings) -> None:
    """Refuse settings outside their range.

    Raises:
        ValueError: Names the setting, its value and the rule.
    """
    ratio = config.sigma_upper_ratio
    _check(
        config,
        aux_states=(config.aux_states in AUX_STATES, _any(AUX_STATES)),
        lambda_aux=(0 <= config.lambda_aux < math.inf, "finite and at least 0"),
        num_rollout_paths=(1 <= config.num_rollout_paths <= rng.MAX_PATHS, "1 to 4096"),
        trajectory_length=(0 <= config.trajectory_length <= rng.MAX_INDICES, "0 to 4096"),
        num_sampling_steps=(1 <= config.num_sampling_steps <= TRAIN_TIMESTEPS, "1 to 1000"),
        cfg_scale_sampling=(0 <= config.cfg_scale_sampling < math.inf, "finite and at least 0"),
        sde_rollout_type=(config.sde_rollout_type in ROLLOUT_TYPES, _any(ROLLOUT_TYPES)),
        sde_noise_scale=(0 <= config.sde_noise_scale < math.inf, "finite and at least 0"),
        sigma_upper_ratio=(ratio is None or 0 < ratio < math.inf, "null, or finite and above 0"),
        aux_group_size=(config.aux_group_size >= 1, "at least 1"),
    )


def _any(allowed: tuple[str, ...]) -> str:
    return "one of " + ", ".join(allowed)


def _check(config: FlowMatchingSettings, **rules: tuple[bool, str]) -> None:
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"objective.{name} = {getattr(config, name)!r} must be {rule}")
