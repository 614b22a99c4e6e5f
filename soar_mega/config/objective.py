"""The ``objective`` section, one model per ``objective.name``."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from soar_mega.config.section import Section, broken_rule

# Largest scale for which the `mode` density of Stable Diffusion 3 stays invertible.
MODE_SCALE_MAX = 2.0 / (math.pi - 2.0)


class FlowMatchingConfig(Section):
    """Rectified-flow matching: pretraining and supervised fine-tuning."""

    name: Literal["flow_matching"] = Field(
        description="Which objective: pretraining and SFT, or SOAR."
    )
    weighting_scheme: Literal["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"] = Field(
        "logit_normal", description="Density of the timestep, with its loss weight."
    )
    logit_mean: float = Field(0.0, description="Mean of logit_normal; t = 1 is noise.")
    logit_std: float = Field(1.0, gt=0, description="Standard deviation of logit_normal.")
    mode_scale: float = Field(1.29, ge=-1, le=MODE_SCALE_MAX, description="Scale of mode.")
    shift: float | None = Field(
        None, gt=0, description="Timestep shift; null takes the one of the model's scheduler."
    )
    sigma_grid: Literal["scheduler", "continuous"] = Field(
        "scheduler", description="Noise levels from the scheduler's table of 1000, or any."
    )
    cond_dropout_rate: float = Field(
        0.1, ge=0, le=1, description="Probability that a sample trains on the empty prompt."
    )
    min_aux_sigma: float = Field(
        0.00299,
        gt=0,
        lt=1,
        description="Lowest noise level of auxiliary states and at which loss weights are taken.",
    )


class SoarConfig(FlowMatchingConfig):
    """SOAR: flow matching plus correction from the model's own off-path states."""

    name: Literal["soar"] = Field(  # type: ignore[assignment]
        description="Flow matching plus SOAR's auxiliary states."
    )
    lambda_aux: float = Field(1.0, ge=0, description="Weight of auxiliary terms; 0 is plain SFT.")
    aux_states: Literal["rollout", "ideal", "independent"] = Field(
        "rollout",
        description="Rolled out (SOAR), or as a control on the ideal path, or drawn independently.",
    )
    num_rollout_paths: int = Field(1, ge=1, description="Rollout paths M; the first is the ODE's.")
    trajectory_length: int = Field(6, ge=0, description="Auxiliary states N per path.")
    num_sampling_steps: int = Field(
        40, ge=1, le=1000, description="The rollout is one step of a sampler with this many."
    )
    cfg_scale_sampling: float = Field(
        4.5, ge=0, description="Guidance scale of the rollout; 1 needs no unconditional pass."
    )
    sde_rollout_type: Literal["sde", "simple", "cps", "flow_sde"] = Field(
        "sde", description="How rollout paths after the first are made stochastic."
    )
    sde_noise_scale: float = Field(0.5, ge=0, description="Noise scale c of those paths.")
    sigma_upper_ratio: float | None = Field(
        None, gt=0, description="Upper end of auxiliary noise levels, times the base's; null: 1."
    )
    aux_group_size: int = Field(
        1, ge=1, description="Auxiliary states that run as one pass: faster, more memory."
    )
    reuse_base_forward: bool = Field(
        True, description="Take the rollout's conditional half from the base pass."
    )

    @model_validator(mode="after")
    def _noise_scale_fits_type(self) -> Self:
        if self.sde_rollout_type == "cps" and self.sde_noise_scale > 1:
            raise broken_rule(
                f"objective.sde_noise_scale = {self.sde_noise_scale:g} must be at most 1 with "
                "objective.sde_rollout_type = cps (the share of noise that is redrawn is "
                "sin(scale * pi / 2)); use a value from 0 to 1 or another rollout type",
                "objective.sde_noise_scale",
                "objective.sde_rollout_type",
            )
        return self
