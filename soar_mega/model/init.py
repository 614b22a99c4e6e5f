"""Fresh weights: a function of (seed, parameter name, element), the same for every layout.

Linear layers are normal with variance 2 / (fan in + fan out) of one matrix (Xavier), embeddings of
time and pooled text normal with deviation 0.02, biases 0, norms 1. Modulations and the output
projection start at 0, so that every block begins as the identity (adaLN-zero of the DiT paper,
arXiv 2212.09748).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import layout_of, local_slice
from soar_mega.rng import keyed_normal_slice

_ZERO = ("modulation.weight", "head.projection.weight", ".bias")


def initialise(stage: MMDiTStage, seed: int) -> None:
    """Fill every parameter and the position table of ``stage`` in place."""
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            layout = layout_of(parameter)
            if name.endswith(_ZERO):
                parameter.zero_()
            elif ".norm_" in name:
                parameter.fill_(1.0)
            else:
                index = local_slice(layout, stage.mesh)
                draw = keyed_normal_slice(
                    seed, name, layout.global_shape, index, device=parameter.device
                )
                deviation = _deviation(name, layout.global_shape)
                parameter.copy_(draw.view(parameter.shape) * deviation)
        stage.patch_embed.position.copy_(position_table(stage.config))


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    if name.startswith("condition."):
        return 0.02
    return math.sqrt(2.0 / (shape[-1] + shape[-2]))


def position_table(config: MMDiTConfig) -> Tensor:
    """The fixed 2-D sine-cosine table of SD3, ``(1, max * max, D)`` fp32.

    Half the channels encode the column, half the row; coordinates are scaled so that a picture of
    ``sample_size`` spans ``sample_size / patch_size`` units from the table's corner.
    """
    size, width = config.pos_embed_max_size, config.width
    base = config.sample_size // config.patch_size
    coordinate = np.arange(size, dtype=np.float64) / (size / base)
    frequency = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    angle = coordinate[:, None] * frequency[None]
    waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    table = np.empty((size, size, width))
    table[:, :, : width // 2] = waves[None, :]
    table[:, :, width // 2 :] = waves[:, None]
    return torch.from_numpy(table.reshape(1, size * size, width)).float()
