"""What the benchmarks have in common: a small model, made-up data, the name of this machine.

Legend: B samples, T text tokens, E text embedding width, V pooled width, C/H/W latent channels,
height, width.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.model.config import MMDiTConfig
from soar_mega.passes import MicroBatch, TextCondition


@dataclass(frozen=True)
class Case:
    """What is measured; the defaults are a 24M-parameter SD3.5-Medium-like model."""

    layers: int = 10
    heads: int = 4
    head_dim: int = 64
    dual_layers: int = 4
    batch: int = 4
    latent_size: int = 32
    text_tokens: int = 154
    trajectory_length: int = 6
    aux_group_size: int = 1
    threads: int = 2

    def architecture(self) -> MMDiTConfig:
        return MMDiTConfig(
            sample_size=self.latent_size,
            num_layers=self.layers,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.heads,
            joint_attention_dim=256,
            caption_projection_dim=self.heads * self.head_dim,
            pooled_projection_dim=128,
            pos_embed_max_size=self.latent_size,
            dual_attention_layers=tuple(range(self.dual_layers)),
            qk_norm="rms_norm",
        )

    def microbatch(self) -> MicroBatch:
        return made_up_microbatch(
            self.architecture(), self.batch, self.latent_size, self.text_tokens
        )


def made_up_microbatch(
    config: MMDiTConfig,
    batch: int,
    latent_size: int,
    text_tokens: int,
    device: torch.device | str = "cpu",
    text_dtype: torch.dtype = torch.float32,
) -> MicroBatch:
    """A microbatch of normal numbers, made on the device; the same for the same arguments.

    Args:
        config: Of the model.
        batch: B.
        latent_size: H and W.
        text_tokens: T.
        device: Where the tensors are.
        text_dtype: Of the text embeddings; the latents are fp32.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def text(rows: int) -> TextCondition:
        return TextCondition(
            draw(rows, text_tokens, config.joint_attention_dim).to(text_dtype),
            draw(rows, config.pooled_projection_dim).to(text_dtype),
        )

    return MicroBatch(
        step=0,
        slots_B=torch.arange(batch),
        clean_BCHW=draw(batch, config.in_channels, latent_size, latent_size),
        prompt=text(batch),
        empty=text(1),
        weight_B=torch.ones(batch, device=device),
    )


def hardware() -> str:
    """Number and name of this machine's processors."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
