"""Latents from noise through our model, with diffusers' own scheduler.

Text conditions and the way from latents to pixels are the caller's: this room knows no encoders.

Legend: B pictures, C/H/W latent channels, height, width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from soar_mega.passes import ModelInput, TextCondition
from soar_mega.rng import Purpose, normal

# Velocities of several inputs: together, so that a pipeline's stages all have something to do.
ModelFunction = Callable[[Sequence[ModelInput]], Sequence[Tensor]]


def one_by_one(model: Callable[[ModelInput], Tensor]) -> ModelFunction:
    """A whole model on one rank as a ``ModelFunction``."""
    return lambda inputs: [model(x) for x in inputs]


def start_noise(
    seeds: Sequence[int],
    shape_CHW: tuple[int, int, int],
    device: torch.device | str = "cpu",
    repeat: int = 0,
) -> Tensor:
    """The noise each picture starts from, fp32 (B, C, H, W).

    A function of the picture's seed, shape and repeat alone: the same on every device and in every
    layout. ``repeat`` numbers pictures of one seed.

    Raises:
        ValueError: A seed or ``repeat`` is negative or 2^32 or more.
    """
    slots_B = torch.tensor(list(seeds), dtype=torch.int64)
    count = shape_CHW[0] * shape_CHW[1] * shape_CHW[2]
    return normal(0, Purpose.SAMPLING, repeat, slots_B, count, device=device).view(-1, *shape_CHW)


def sampler_sigmas(scheduler_folder: Path | str, num_inference_steps: int) -> list[float]:
    """The noise levels ``generate`` passes through: K + 1 fp32 numbers from noise to 0, K steps.

    Args:
        scheduler_folder: As for ``generate``.
        num_inference_steps: K.

    Raises:
        ValueError: K is below 1, or a step of this scheduler is not z + (sigma' - sigma) v.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}: it must be at least 1")
    scheduler = _scheduler(scheduler_folder)
    for setting in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(setting):
            path = Path(scheduler_folder) / "scheduler_config.json"
            raise ValueError(f"{path} has {setting}: plain Euler steps from noise are supported")
    scheduler.set_timesteps(num_inference_steps)
    sigmas: list[float] = scheduler.sigmas.tolist()
    return sigmas


@torch.no_grad()
def generate(
    model: ModelFunction,
    prompts: TextCondition,
    empty: TextCondition,
    scheduler_folder: Path | str,
    *,
    latents_BCHW: Tensor,
    num_inference_steps: int = 28,
    guidance_scale: float = 4.5,
    batch_size: int | None = None,
) -> Tensor:
    """Denoise latents as ``StableDiffusion3Pipeline`` does, with classifier-free guidance.

    Args:
        model: Velocities of several inputs: a ``Pipeline``'s ``forward_everywhere``, or
            ``one_by_one`` of an ``MMDiTStage``; every rank that holds a part of the model calls
            ``generate`` with the same arguments.
        prompts: Condition of each picture, B rows.
        empty: Condition of the empty prompt, one row.
        scheduler_folder: A folder with ``scheduler_config.json``, for example a diffusers model's
            ``scheduler``.
        latents_BCHW: What to start from, fp32, on the model's device: see ``start_noise``.
        num_inference_steps: Steps from noise to picture.
        guidance_scale: Strength of the prompt; at most 1 means no guidance and no empty pass.
        batch_size: Pictures of one pass through the model; None: all.

    Returns:
        Clean latents (B, C, H, W), fp32, scaled and shifted as the model sees them.

    Raises:
        ValueError: The number of prompts and latents differ, or a number is out of range.
    """
    count = len(latents_BCHW)
    if len(prompts.text_BTE) != count or len(empty.text_BTE) != 1:
        raise ValueError(
            f"{len(prompts.text_BTE)} prompts and {len(empty.text_BTE)} empty prompts for {count} "
            "pictures: one prompt each and one empty prompt are needed"
        )
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}: it must be at least 1")
    size = count if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch size is {size}: it must be at least 1")
    parts = [slice(start, start + size) for start in range(0, count, size)]
    scheduler = _scheduler(scheduler_folder)
    scheduler.set_timesteps(num_inference_steps, device=latents_BCHW.device)
    latents_BCHW = latents_BCHW.float()
    for timestep in scheduler.timesteps:
        inputs = []
        for part in parts:
            latent_BCHW = latents_BCHW[part]
            rows = len(latent_BCHW)
            timestep_B = timestep.to(latent_BCHW.dtype).expand(rows)
            wanted = TextCondition(prompts.text_BTE[part], prompts.pooled_BV[part])
            nothing = TextCondition(
                empty.text_BTE.expand(rows, -1, -1), empty.pooled_BV.expand(rows, -1)
            )
            conditions = [wanted, nothing] if guidance_scale > 1 else [wanted]
            inputs += [ModelInput(latent_BCHW, timestep_B, c) for c in conditions]
        velocities = [v.float() for v in model(inputs)]
        if guidance_scale > 1:
            pairs = zip(velocities[::2], velocities[1::2], strict=True)
            velocities = [free + guidance_scale * (v - free) for v, free in pairs]
        latents_BCHW = scheduler.step(
            torch.cat(velocities), timestep, latents_BCHW, return_dict=False
        )[0]
    return latents_BCHW


def _scheduler(folder: Path | str) -> Any:
    path = Path(folder) / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: it says how the model is sampled")
    config = json.loads(path.read_text())
    kind = config.get("_class_name")
    if kind != "FlowMatchEulerDiscreteScheduler" or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{path} is a {kind} (use_dynamic_shifting {config.get('use_dynamic_shifting')}): "
            "a FlowMatchEulerDiscreteScheduler with a fixed shift is supported"
        )
    return FlowMatchEulerDiscreteScheduler.from_config(config)
