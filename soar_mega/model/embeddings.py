"""What turns latents, timestep and text into the streams of the first stage.

Legend: B samples, C/H/W latent channels, height, width, P patch size, L image tokens, T text
tokens, D width, E text embedding width, V pooled width; ``x_lBD`` is one tensor rank's share of the
tokens with sequence parallel, all of them without.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soar_mega.backends import Backend
from soar_mega.model.config import MMDiTConfig
from soar_mega.parallel.collectives import pad_tokens, padded_length
from soar_mega.parallel.layout import GradientKind, ParameterLayout
from soar_mega.parallel.mesh import Mesh


def own_tokens(x_LBD: Tensor, mesh: Mesh, sequence_parallel: bool, multiple: int) -> Tensor:
    """This rank's share of tokens that are the same on all tensor ranks and need no gradient.

    Shares are padded with zeros to equal multiples of ``multiple``.
    """
    shares = mesh.tensor_size if sequence_parallel else 1
    x_LBD = pad_tokens(x_LBD, padded_length(x_LBD.shape[0], shares, multiple))
    return x_LBD.chunk(shares)[mesh.tensor_rank if sequence_parallel else 0]


def whole_linear(
    out_features: int, in_features: int, mesh: Mesh, backend: Backend, gradient: GradientKind
) -> nn.Module:
    """A linear layer whose weight every tensor rank holds whole."""
    return backend.linear(
        ParameterLayout((out_features, in_features), None, gradient),
        ParameterLayout((out_features,), None, gradient),
        mesh,
    )


class PatchEmbed(nn.Module):
    """Patches to tokens plus the stored position table, cropped at its centre."""

    position: Tensor

    def __init__(
        self, config: MMDiTConfig, mesh: Mesh, backend: Backend, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.max_size = config.pos_embed_max_size
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.multiple = backend.token_multiple
        kind: GradientKind = "partial" if sequence_parallel else "replicated"
        inputs = config.in_channels * self.patch**2
        self.projection = whole_linear(config.width, inputs, mesh, backend, kind)
        table = torch.empty(1, self.max_size**2, config.width, device=mesh.device)
        self.register_buffer("position", table)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        """``(l, B, D)`` tokens; ValueError for a size the table or the patches cannot hold."""
        B, C, H, W = latent_BCHW.shape
        p = self.patch
        if H % p or W % p or max(H, W) // p > self.max_size:
            raise ValueError(
                f"latents of {H}x{W} do not fit: both must divide by the patch size {p} and be at "
                f"most pos_embed_max_size * patch_size = {self.max_size * p}"
            )
        rows, columns = H // p, W // p
        patches_LBX = (
            latent_BCHW.view(B, C, rows, p, columns, p)
            .permute(2, 4, 0, 1, 3, 5)
            .reshape(rows * columns, B, C * p * p)
        )
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        table = self.position.view(self.max_size, self.max_size, -1)
        position_L1D = table[top : top + rows, left : left + columns].reshape(rows * columns, 1, -1)
        patches, position = (
            own_tokens(x, self.mesh, self.sequence_parallel, self.multiple)
            for x in (patches_LBX, position_L1D)
        )
        tokens_lBD = self.projection(patches)
        return tokens_lBD + position.to(tokens_lBD.dtype)


class TextEmbed(nn.Module):
    """Text embeddings to the width of the streams."""

    def __init__(
        self, config: MMDiTConfig, mesh: Mesh, backend: Backend, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.multiple = backend.token_multiple
        kind: GradientKind = "partial" if sequence_parallel else "replicated"
        self.projection = whole_linear(
            config.width, config.joint_attention_dim, mesh, backend, kind
        )

    def forward(self, text_BTE: Tensor) -> Tensor:
        """``(t, B, D)`` tokens."""
        return self.projection(
            own_tokens(text_BTE.transpose(0, 1), self.mesh, self.sequence_parallel, self.multiple)
        )


def sinusoid(timestep_B: Tensor, channels: int) -> Tensor:
    """Cosines then sines of the timestep at ``channels / 2`` frequencies, in its dtype."""
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(
        half, dtype=timestep_B.dtype, device=timestep_B.device
    )
    angle_BX = timestep_B[:, None] * torch.exp(exponent / half)[None]
    return torch.cat([angle_BX.cos(), angle_BX.sin()], dim=-1)


class Conditioning(nn.Module):
    """Timestep and pooled text to the vector that modulates every block; the same on all ranks."""

    FREQUENCIES = 256

    def __init__(self, config: MMDiTConfig, mesh: Mesh, backend: Backend) -> None:
        super().__init__()
        D = config.width
        self.time_in = whole_linear(D, self.FREQUENCIES, mesh, backend, "replicated")
        self.time_out = whole_linear(D, D, mesh, backend, "replicated")
        self.pooled_in = whole_linear(D, config.pooled_projection_dim, mesh, backend, "replicated")
        self.pooled_out = whole_linear(D, D, mesh, backend, "replicated")

    def forward(self, timestep_B: Tensor, pooled_BV: Tensor) -> Tensor:
        """``(B, D)``; the sinusoid is taken in the timestep's precision, then cast."""
        time_BX = sinusoid(timestep_B, self.FREQUENCIES).to(pooled_BV.dtype)
        time_BD = self.time_out(F.silu(self.time_in(time_BX)))
        return time_BD + self.pooled_out(F.silu(self.pooled_in(pooled_BV)))
