"""``MMDiTStage``: the slice of an MMDiT that one process owns, from its inputs to its outputs.

Legend: B rows, C/H/W latent channels, height, width, P patch size, L image tokens, T text tokens,
D width; ``x_lBD`` is one tensor rank's share of the tokens with sequence parallel, all of them
without.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from soar_mega.backends import Backend
from soar_mega.model.attention import NORM_EPS, Lengths
from soar_mega.model.block import JointBlock, Modulation
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.embeddings import Conditioning, PatchEmbed, TextEmbed, whole_linear
from soar_mega.model.modulation import modulate, modulation_linear, modulations
from soar_mega.model.recompute import Recompute, run_block
from soar_mega.parallel.collectives import gather_tokens
from soar_mega.parallel.layout import GradientKind
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import ModelInput

ActivationCheckpointing = Literal["none", "selective", "full"]


class Head(nn.Module):
    """Final modulation, projection to patches, and patches back to a latent."""

    def __init__(
        self, config: MMDiTConfig, mesh: Mesh, backend: Backend, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.backend, self.mesh, self.sequence_parallel = backend, mesh, sequence_parallel
        self.patch, self.channels = config.patch_size, config.out_channels
        self.modulation = modulation_linear(2, config.width, mesh, backend)
        outputs = self.patch**2 * self.channels
        kind: GradientKind = "partial" if sequence_parallel else "replicated"
        self.projection = whole_linear(outputs, config.width, mesh, backend, kind)

    def forward(self, image_lBD: Tensor, modulation: Modulation, height: int, width: int) -> Tensor:
        """``(B, C, H, W)``: the velocity, whole on every tensor rank."""
        scale, shift = modulation
        normed = modulate(self.backend.layer_norm(image_lBD, NORM_EPS), scale, shift)
        patches = self.projection(normed)
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        if self.sequence_parallel:
            # Every rank computes the same loss from the gathered output: no sum in the backward.
            patches = gather_tokens(patches, self.mesh, partial_gradient=False)[: rows * columns]
        return (
            patches.view(rows, columns, -1, p, p, self.channels)
            .permute(2, 5, 0, 3, 1, 4)
            .reshape(-1, self.channels, height, width)
        )


class MMDiTStage(nn.Module):
    """A whole MMDiT on one tensor-parallel group.

    Args:
        config: The architecture.
        mesh: Where this process stands; ``config.check_tensor_parallel`` must hold for it.
        backend: Maker of linears, norms and attention.
        sequence_parallel: Cut the tokens of both streams over the tensor ranks between linears.
        activation_checkpointing: ``none``, ``selective`` (matrix products and attention are kept,
        the
            rest computed again) or ``full`` (blocks are computed again); passes without gradient
            ignore it.

    Raises:
        ValueError: The heads do not divide by the tensor-parallel size.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        mesh: Mesh,
        backend: Backend,
        *,
        sequence_parallel: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__()
        config.check_tensor_parallel(mesh.tensor_size)
        sequence_parallel = sequence_parallel and mesh.tensor_size > 1
        self.config, self.mesh, self.sequence_parallel = config, mesh, sequence_parallel
        self.recompute = Recompute(activation_checkpointing)
        parts = (config, mesh, backend, sequence_parallel)
        self.patch_embed = PatchEmbed(*parts)
        self.text_embed = TextEmbed(*parts)
        self.condition = Conditioning(config, mesh, backend)
        self.blocks = nn.ModuleDict(
            {
                str(layer): JointBlock(config, layer, mesh, backend, sequence_parallel)
                for layer in range(config.num_layers)
            }
        )
        self.head = Head(*parts)

    def forward(self, x: ModelInput) -> Tensor:
        """The velocity ``(B, C, H, W)`` in the compute dtype."""
        dtype = self.dtype
        latent_BCHW = x.latent_BCHW.to(dtype)
        height, width = latent_BCHW.shape[-2:]
        lengths = Lengths(
            image=height * width // self.config.patch_size**2, text=x.condition.text_BTE.shape[1]
        )
        image_lBD = self.patch_embed(latent_BCHW)
        text_tBD = self.text_embed(x.condition.text_BTE.to(dtype))
        conditioning_BD = self.condition(x.timestep_B, x.condition.pooled_BV.to(dtype))

        blocks: list[JointBlock] = list(self.blocks.values())  # type: ignore[arg-type]
        linears = [m for b in blocks for m in (b.image_modulation, b.text_modulation)]
        values = modulations(
            conditioning_BD,
            [*linears, self.head.modulation],
            self.mesh,
            sequence_parallel=self.sequence_parallel,
        )
        for index, block in enumerate(blocks):
            image_lBD, text_tBD = run_block(
                self.recompute,
                block,
                image_lBD,
                text_tBD,
                values[2 * index],
                values[2 * index + 1],
                lengths,
            )
        return self.head(image_lBD, values[-1], height, width)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(self.parameters()).dtype
