"""The VAE of the tiny pipeline: diffusers' ``AutoencoderKL``, trained on digit pictures.

Its latents are made to be easy for a small diffusion model. Training adds noise to them, so the
decoder forgives small errors, and holds their overall variance at one, so the network must spread
information instead of hiding it below the noise. The posterior's standard deviation is a constant.
The weights are shipped under ``assets/``; ``tools/train_tiny_parts.py vae`` makes
them.

Legend: B pictures, C latent channels, H/W height and width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soar_mega.data.tiny import digits

SHIPPED_WEIGHTS = Path(__file__).resolve().parents[3] / "assets" / "tiny_vae.safetensors"
LATENT_CHANNELS = 16
POSTERIOR_STD = 0.05
_CROP = 32
_MAX_LATENT_NOISE = 0.3
_LATENT_STD = 0.65  # That of the shipped VAE's latents, before the scaling factor.


def make_vae(scaling_factor: float = 1.0, shift_factor: float = 0.0) -> Any:
    """An untrained VAE: downsampling 8, 16 latent channels, channels-last for speed on a CPU.

    There is no attention: cells of a picture have nothing to tell each other. Four groups and not
    eight: a norm of every single channel would make a flat paper invisible.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=digits.PICTURE_SIZE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    return vae.to(memory_format=torch.channels_last)


def load_vae(path: Path = SHIPPED_WEIGHTS) -> Any:
    """The trained VAE in fp32, its scaling and shift factors still 1 and 0.

    Raises:
        FileNotFoundError: If the weights are not there.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(
            f"No VAE weights at {path}. "
            f"Make them: python tools/train_tiny_parts.py vae --out {path}"
        )
    vae = make_vae()
    vae.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return vae.eval()


def save_vae(vae: Any, path: Path) -> None:
    """Writes the weights in fp16, half the size at no visible loss."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in vae.state_dict().items()}, path)


def to_tensor(pictures_BHWC: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 pictures as (B, 3, H, W) fp32 in [-1, 1], channels-last in memory."""
    return torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(decoded_BCHW: Tensor) -> np.ndarray:
    """(B, 3, H, W) values in [-1, 1] as (B, H, W, 3) uint8 pictures; values beyond are clipped."""
    pixels = (decoded_BCHW.float().clamp(-1, 1) + 1.0) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def encode(vae: Any, pictures_BHWC: np.ndarray, batch_size: int = 64) -> Tensor:
    """Posterior means of uint8 pictures, (B, C, H/8, W/8), neither shifted nor scaled."""
    parts = (to_tensor(part) for part in _batches(pictures_BHWC, batch_size))
    return torch.cat([vae.encode(part).latent_dist.mode() for part in parts])


@torch.no_grad()
def decode(vae: Any, latents_BCHW: Tensor, batch_size: int = 64) -> np.ndarray:
    """uint8 pictures (B, H, W, 3) of latents that are neither shifted nor scaled."""
    parts = latents_BCHW.split(batch_size)
    return np.concatenate([to_pictures(vae.decode(part).sample) for part in parts])


def _batches(pictures_BHWC: np.ndarray, batch_size: int) -> list[np.ndarray]:
    starts = range(0, len(pictures_BHWC), batch_size)
    return [pictures_BHWC[start : start + batch_size] for start in starts]


def calibrate(vae: Any, pictures_BHWC: np.ndarray) -> None:
    """Sets shift and scale so that ``(latent - shift) * scale`` has mean 0 and variance 1."""
    latents = encode(vae, pictures_BHWC).double()
    std = math.sqrt(float(latents.var(correction=0)) + POSTERIOR_STD**2)
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 6), scaling_factor=round(1.0 / std, 6)
    )


def psnr(pictures_BHWC: np.ndarray, others_BHWC: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pictures together."""
    error = pictures_BHWC.astype(np.float64) - others_BHWC.astype(np.float64)
    return 10.0 * math.log10(255.0**2 / max(float((error**2).mean()), 1e-12))


def _crop_with_ink(
    picture: np.ndarray, scene: digits.Scene, rng: np.random.Generator
) -> np.ndarray:
    """A quarter of the picture, on the cell grid, that holds at least one digit."""
    row, column = scene.cells()[rng.integers(len(scene.number))]
    last = digits.GRID - _CROP // digits.CELL_SIZE
    corner = [int(np.clip(cell - rng.integers(2), 0, last)) for cell in (row, column)]
    y, x = (cells * digits.CELL_SIZE for cells in corner)
    return picture[y : y + _CROP, x : x + _CROP]


def _loss(vae: Any, pictures_BCHW: Tensor, noise: torch.Generator) -> Tensor:
    mean_BCHW = vae.encode(pictures_BCHW).latent_dist.mean
    level_B = torch.rand(len(mean_BCHW), 1, 1, 1, generator=noise) * _MAX_LATENT_NOISE
    noisy_BCHW = mean_BCHW + level_B * torch.randn(mean_BCHW.shape, generator=noise)
    error = vae.decode(noisy_BCHW).sample - pictures_BCHW
    reconstruction = error.square().mean() + 0.1 * error.abs().mean()
    centre = mean_BCHW.mean(dim=(0, 2, 3)).square().mean()
    spread = mean_BCHW.var().log().square()
    return reconstruction + 0.01 * (centre + spread)


def train_vae(
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    report: Callable[[int, float, float], None],
) -> Any:
    """Trains a VAE on digit pictures of the generator's scans.

    The first two thirds of the steps see crops of a quarter of a picture with ink in them, four
    times as fast; the rest see whole pictures, as in use.

    Args:
        seed: Of weights, pictures and noise.
        steps: Optimiser steps.
        batch_size: Whole pictures in a step; four times as many crops.
        learning_rate: Its peak; warm-up over 100 steps, then a cosine to zero.
        report: Called every 100 steps with the step, the loss and the seconds since the start.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    scans = digits.load_scans("generator")

    def pictures(step: int) -> np.ndarray:
        crops = step < 2 * steps // 3
        scenes = digits.training_scenes(batch_size * (4 if crops else 1), seed=step)
        drawn = [digits.draw_array(scene, scans, rng) for scene in scenes]
        if crops:
            pairs = zip(drawn, scenes, strict=True)
            drawn = [_crop_with_ink(picture, scene, rng) for picture, scene in pairs]
        return np.stack(drawn)

    return descend(make_vae(), pictures, seed, steps, learning_rate, report)


def descend(
    vae: Any,
    pictures: Callable[[int], np.ndarray],
    seed: int,
    steps: int,
    learning_rate: float,
    report: Callable[[int, float, float], None],
) -> Any:
    """Train a VAE on ``pictures(step)``, (B, H, W, 3) uint8, and fix its posterior's scale."""
    noise = torch.Generator().manual_seed(seed)
    vae = vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = (
            learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        )
        loss = _loss(vae, to_tensor(pictures(step)), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            report(step + 1, float(loss.detach()), time.perf_counter() - start)
    _finish(vae)
    return vae.eval()


@torch.no_grad()
def _finish(vae: Any) -> None:
    """Sets the posterior's standard deviation and moves the latents' scale away from one.

    A published VAE needs its scaling factor; with one that does not, forgetting it would go unseen.
    """
    out, back = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[LATENT_CHANNELS:] = 0.0
    out.bias[LATENT_CHANNELS:] = 2.0 * math.log(POSTERIOR_STD)
    out.weight[:LATENT_CHANNELS] *= _LATENT_STD
    out.bias[:LATENT_CHANNELS] *= _LATENT_STD
    back.weight /= _LATENT_STD
