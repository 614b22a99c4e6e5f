"""Decoded pixels as the VAE takes them.

Legend: B pictures, H height, W width, C = 3 channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_model_range(pixels_BHWC: Tensor) -> Tensor:
    """uint8 RGB pixels to a contiguous (B, C, H, W) fp32 tensor in [-1, 1], on the same device."""
    scaled_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(
        torch.float32, memory_format=torch.contiguous_format, copy=True
    )
    return scaled_BCHW.mul_(1 / 127.5).sub_(1)
