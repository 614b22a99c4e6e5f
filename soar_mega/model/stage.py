"""``MMDiTStage``: the contiguous slice of an MMDiT that one pipeline stage owns.

Legend: B rows, C/H/W latent channels, height, width, P patch size, L image tokens, T text tokens,
D width; ``x_lBD`` is one tensor rank's share of the tokens with sequence parallel, all of them
without.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from soar_mega.backends import Backend, WeightWork
from soar_mega.model.attention import NORM_EPS, Lengths
from soar_mega.model.block import JointBlock, Modulation
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.embeddings import Conditioning, PatchEmbed, TextEmbed, whole_linear
from soar_mega.model.modulation import modulation_linear, modulations
from soar_mega.model.payload import PassSize, Payload, PayloadShapes
from soar_mega.model.recompute import BlockCall, Recompute, run_block
from soar_mega.parallel.collectives import gather_tokens, padded_length
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
        normed = self.backend.elementwise.modulated_norm(image_lBD, scale, shift, NORM_EPS)
        patches = self.projection(normed)
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        if self.sequence_parallel:
            # Every rank computes the same loss from the gathered output: no sum in the backward.
            patches = gather_tokens(patches, self.mesh, partial_gradient=False)
        return (
            patches[: rows * columns]
            .view(rows, columns, -1, p, p, self.channels)
            .permute(2, 5, 0, 3, 1, 4)
            .reshape(-1, self.channels, height, width)
        )


class MMDiTStage(nn.Module):
    """A contiguous slice of an MMDiT, on one tensor-parallel group; by default all of it.

    The slice with layer 0 owns the embeddings, the one with the last layer the head. Parameters
    have the names they have in the whole model. What is called for a pass:

        only stage       ``forward``, which is ``velocity`` of ``embed``
        first stage      ``run`` of ``embed``
        stages between   ``run``
        last stage       ``velocity``

    Args:
        config: The architecture, of the whole model.
        mesh: Where this process stands; ``config.check_tensor_parallel`` must hold for it.
        backend: Maker of linears, norms and attention.
        layers: The blocks of this slice; None: all.
        sequence_parallel: Cut the tokens of both streams over the tensor ranks between linears.
        activation_checkpointing: ``none``, ``selective`` (matrix products and attention are kept,
            the rest computed again) or ``full`` (blocks are computed again); passes without
            gradient ignore it.
        call_block: Calls a block; ``compiled_run_block()`` on a backend that it can trace.

    Raises:
        ValueError: The tensor-parallel size does not cut the model, or ``layers`` is no slice
            of the model.
    """

    # Of the first stage only.
    patch_embed: PatchEmbed
    text_embed: TextEmbed
    condition: Conditioning
    # Of the last stage only.
    head: Head

    def __init__(
        self,
        config: MMDiTConfig,
        mesh: Mesh,
        backend: Backend,
        *,
        layers: range | None = None,
        sequence_parallel: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
        call_block: BlockCall = run_block,
    ) -> None:
        super().__init__()
        config.check_tensor_parallel(mesh.tensor_size)
        sequence_parallel = sequence_parallel and mesh.tensor_size > 1
        self.config, self.mesh, self.sequence_parallel = config, mesh, sequence_parallel
        self.backend = backend
        self.layers = range(config.num_layers) if layers is None else layers
        if not 0 <= self.layers.start < self.layers.stop <= config.num_layers or (
            self.layers.step != 1
        ):
            raise ValueError(
                f"a stage of {self.layers} does not fit: it must hold one or more consecutive "
                f"layers of the model's {config.num_layers}"
            )
        self.is_first = self.layers.start == 0
        self.is_last = self.layers.stop == config.num_layers
        self.recompute = Recompute(activation_checkpointing)
        self._call_block = call_block
        parts = (config, mesh, backend, sequence_parallel)
        if self.is_first:
            self.patch_embed = PatchEmbed(*parts)
            self.text_embed = TextEmbed(*parts)
            self.condition = Conditioning(config, mesh, backend)
        self.blocks = nn.ModuleDict(
            {
                str(layer): JointBlock(
                    config, layer, mesh, backend.for_layer(layer), sequence_parallel
                )
                for layer in self.layers
            }
        )
        if self.is_last:
            self.head = Head(*parts)

    def forward(self, x: ModelInput) -> Tensor:
        """The whole model: the velocity ``(B, C, H, W)`` in the compute dtype."""
        return self.velocity(self.embed(x), PassSize.of(x))

    def embed(self, x: ModelInput) -> Payload:
        """First stage: what enters its blocks."""
        dtype = self.dtype
        return Payload(
            self.patch_embed(x.latent_BCHW.to(dtype)),
            self.text_embed(x.condition.text_BTE.to(dtype)),
            self.condition(x.timestep_B, x.condition.pooled_BV.to(dtype)),
        )

    def run(self, payload: Payload, size: PassSize) -> Payload:
        """Every stage but the last: its blocks, to the payload of the next stage."""
        return self._run_blocks(payload, size, self._modulations(payload))

    def velocity(self, payload: Payload, size: PassSize) -> Tensor:
        """Last stage: its blocks and the head, to the velocity ``(B, C, H, W)``."""
        *values, final = self._modulations(payload, self.head.modulation)
        image_lBD = self._run_blocks(payload, size, values).image_lBD
        return self.head(image_lBD, final, size.height, size.width)

    def payload_shapes(self, rows: int, height: int, width: int, text_length: int) -> PayloadShapes:
        """Shapes of a payload of this model, the same between any two stages.

        Args:
            rows, height, width, text_length: See ``PassSize``.
        """
        image_length = height * width // self.config.patch_size**2
        shares = self.mesh.tensor_size if self.sequence_parallel else 1
        image, text = (
            padded_length(length, shares, self.backend.token_multiple) // shares
            for length in (image_length, text_length)
        )
        D = self.config.width
        return PayloadShapes((image, rows, D), (text, rows, D), (rows, D))

    def hold_weight_gradients(self) -> AbstractContextManager[WeightWork]:
        """Context of a backward that leaves weight gradients for later: see ``Backend``."""
        return self.backend.hold_weight_gradients()

    def _blocks(self) -> list[JointBlock]:
        return list(self.blocks.values())  # type: ignore[arg-type]

    def _modulations(self, payload: Payload, *others: nn.Module) -> list[Modulation]:
        """Of each block the image's and the text's, then of ``others``, by one gather."""
        linears = [m for b in self._blocks() for m in (b.image_modulation, b.text_modulation)]
        return modulations(
            payload.conditioning_BD,
            [*linears, *others],
            self.mesh,
            sequence_parallel=self.sequence_parallel,
        )

    def _run_blocks(self, payload: Payload, size: PassSize, values: list[Modulation]) -> Payload:
        image_lBD, text_tBD = payload.image_lBD, payload.text_tBD
        lengths = Lengths(
            image=size.height * size.width // self.config.patch_size**2, text=size.text_length
        )
        with self.backend.precision():
            for index, block in enumerate(self._blocks()):
                image_lBD, text_tBD = self._call_block(
                    self.recompute,
                    self.backend,
                    block,
                    image_lBD,
                    text_tBD,
                    values[2 * index],
                    values[2 * index + 1],
                    lengths,
                )
        return Payload(image_lBD, text_tBD, payload.conditioning_BD)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(self.parameters()).dtype
