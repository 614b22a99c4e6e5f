"""The joint block of an MMDiT: two streams, one attention over both, an MLP for each.

Legend: L image tokens, T text tokens, B samples, D width; ``x_lBD`` is one tensor rank's share of
the tokens with sequence parallel, all of them without.
"""

from __future__ import annotations

from torch import Tensor, nn

from soar_mega.backends import Backend
from soar_mega.model.attention import NORM_EPS, ImageAttention, JointAttention, Lengths
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.modulation import modulation_linear
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh

Modulation = tuple[Tensor, ...]


class MLP(nn.Module):
    """Width to four times the width and back, GELU (tanh) between."""

    def __init__(
        self,
        config: MMDiTConfig,
        mesh: Mesh,
        backend: Backend,
        sequence_parallel: bool,
        *,
        overlaps: bool = False,
    ) -> None:
        super().__init__()
        self.elementwise = backend.elementwise
        D = config.width
        self.up = backend.column_linear(
            ParameterLayout((4 * D, D), 0, "sharded"),
            ParameterLayout((4 * D,), 0, "sharded"),
            mesh,
            sequence_parallel=sequence_parallel,
            overlap="fc1" if overlaps else None,
        )
        self.down = backend.row_linear(
            ParameterLayout((D, 4 * D), 1, "sharded"),
            ParameterLayout((D,), None, "partial" if sequence_parallel else "replicated"),
            mesh,
            sequence_parallel=sequence_parallel,
            overlap="fc2" if overlaps else None,
        )

    def forward(self, x_lBD: Tensor) -> Tensor:
        return self.down(self.elementwise.gelu(self.up(x_lBD)))


class JointBlock(nn.Module):
    """One transformer block; ``layer`` decides whether it is dual and whether it is the last."""

    def __init__(
        self,
        config: MMDiTConfig,
        layer: int,
        mesh: Mesh,
        backend: Backend,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.elementwise = backend.elementwise
        parts = (config, mesh, backend, sequence_parallel)
        dual, last = config.is_dual(layer), config.is_last(layer)
        D = config.width
        self.image_modulation = modulation_linear(9 if dual else 6, D, mesh, backend)
        self.text_modulation = modulation_linear(2 if last else 6, D, mesh, backend)
        self.attention = JointAttention(*parts, text_output=not last)
        self.dual_attention = ImageAttention(*parts) if dual else None
        self.image_mlp = MLP(*parts, overlaps=True)
        self.text_mlp = None if last else MLP(*parts)

    def forward(
        self,
        image_lBD: Tensor,
        text_tBD: Tensor,
        image_modulation: Modulation,
        text_modulation: Modulation,
        lengths: Lengths,
    ) -> tuple[Tensor, Tensor]:
        """Both streams after the block; the last block returns its text stream unchanged."""
        ops = self.elementwise
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = image_modulation
        if self.text_mlp is None:
            text_scale, text_shift = text_modulation
        else:
            text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = (
                text_modulation
            )

        if self.dual_attention is None:
            image_normed = ops.modulated_norm(image_lBD, scale, shift, NORM_EPS)
        else:
            second_shift, second_scale, second_gate = second
            image_normed, second_normed = ops.twice_modulated_norm(
                image_lBD, (scale, shift), (second_scale, second_shift), NORM_EPS
            )
        text_normed = ops.modulated_norm(text_tBD, text_scale, text_shift, NORM_EPS)

        image_attended, text_attended = self.attention(image_normed, text_normed, lengths)
        image_lBD = ops.gated_add(image_lBD, gate, image_attended)
        if self.dual_attention is not None:
            attended = self.dual_attention(second_normed, lengths)
            image_lBD = ops.gated_add(image_lBD, second_gate, attended)

        image_lBD = self._mlp(self.image_mlp, image_lBD, mlp_shift, mlp_scale, mlp_gate)
        if self.text_mlp is not None:
            assert text_attended is not None
            text_tBD = ops.gated_add(text_tBD, text_gate, text_attended)
            text_tBD = self._mlp(
                self.text_mlp, text_tBD, text_mlp_shift, text_mlp_scale, text_mlp_gate
            )
        return image_lBD, text_tBD

    def _mlp(
        self, mlp: nn.Module, x_lBD: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        normed = self.elementwise.modulated_norm(x_lBD, scale, shift, NORM_EPS)
        return self.elementwise.gated_add(x_lBD, gate, mlp(normed))
