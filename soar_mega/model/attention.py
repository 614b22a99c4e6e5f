"""Joint attention over image and text tokens, and the image-only one of SD3.5-Medium.

Legend: L image tokens, T text tokens, B samples, D width, H local heads, d head width; ``x_lBD`` is
one tensor rank's share of the tokens with sequence parallel, all of them without. Either may have
padding at the end of all tokens, which is dropped before attention and comes back behind it.

Where the tensor size does not divide the heads, the last ranks have padded heads, whose QKV rows
and output columns are zeros. They stay so: with zero values and zero output columns every gradient
of theirs is exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soar_mega.backends import Backend, Overlap
from soar_mega.model.config import MMDiTConfig
from soar_mega.parallel.collectives import pad_tokens
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Lengths:
    """Real numbers of tokens, without padding."""

    image: int
    text: int


class _Stream(nn.Module):
    """QKV of one stream, with its QK norms, heads (whole ones) cut over the tensor ranks."""

    def __init__(
        self,
        config: MMDiTConfig,
        mesh: Mesh,
        backend: Backend,
        sequence_parallel: bool,
        *,
        overlap: Overlap | None = None,
    ) -> None:
        super().__init__()
        D, head = config.width, config.attention_head_dim
        self.heads = -(-config.num_attention_heads // mesh.tensor_size)
        self.qkv = backend.column_linear(
            ParameterLayout((3, D, D), 1, "sharded", block=head),
            ParameterLayout((3, D), 1, "sharded", block=head),
            mesh,
            sequence_parallel=sequence_parallel,
            overlap=overlap,
        )
        self.norm_q: nn.Module | None = None
        self.norm_k: nn.Module | None = None
        if config.qk_norm is not None:
            # Each rank norms its own heads only, so its weight gradient is a part of the sum.
            layout = ParameterLayout((config.attention_head_dim,), None, "partial")
            self.norm_q = backend.rms_norm(layout, mesh, NORM_EPS)
            self.norm_k = backend.rms_norm(layout, mesh, NORM_EPS)

    def forward(self, x_lBD: Tensor, length: int, *, query: bool = True) -> list[Tensor | None]:
        """``q, k, v``, each ``(length, B, H, d)``; q is None where no query is asked for."""
        qkv = self.qkv(x_lBD)[:length]
        q, k, v = qkv.view(length, qkv.shape[1], 3, self.heads, -1).unbind(2)
        if self.norm_q is not None and self.norm_k is not None:
            k = self.norm_k(k)
            q = self.norm_q(q) if query else q
        return [q if query else None, k, v]


class _Output(nn.Module):
    """Heads back to the stream."""

    def __init__(
        self,
        config: MMDiTConfig,
        mesh: Mesh,
        backend: Backend,
        sequence_parallel: bool,
        *,
        overlap: Overlap | None = None,
    ) -> None:
        super().__init__()
        D = config.width
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.projection = backend.row_linear(
            ParameterLayout((D, D), 1, "sharded", block=config.attention_head_dim),
            ParameterLayout((D,), None, "partial" if sequence_parallel else "replicated"),
            mesh,
            sequence_parallel=sequence_parallel,
            overlap=overlap,
        )

    def forward(self, x_LBD: Tensor, share: int) -> Tensor:
        """The stream's tokens, ``share`` of them on each rank, padding included."""
        ranks = self.mesh.tensor_size if self.sequence_parallel else 1
        return self.projection(pad_tokens(x_LBD, share * ranks))


class JointAttention(nn.Module):
    """Attention of both streams over both; the last block has no text output and no text query."""

    def __init__(
        self,
        config: MMDiTConfig,
        mesh: Mesh,
        backend: Backend,
        sequence_parallel: bool,
        *,
        text_output: bool,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.image = _Stream(config, mesh, backend, sequence_parallel, overlap="qkv")
        self.text = _Stream(config, mesh, backend, sequence_parallel)
        self.image_out = _Output(config, mesh, backend, sequence_parallel, overlap="proj")
        self.text_out = _Output(config, mesh, backend, sequence_parallel) if text_output else None

    def forward(
        self, image_lBD: Tensor, text_tBD: Tensor, lengths: Lengths
    ) -> tuple[Tensor, Tensor | None]:
        q_image, k_image, v_image = self.image(image_lBD, lengths.image)
        q_text, k_text, v_text = self.text(text_tBD, lengths.text, query=self.text_out is not None)
        queries = [q for q in (q_image, q_text) if q is not None]
        out_LBD = self.backend.attention(
            torch.cat(queries), torch.cat([k_image, k_text]), torch.cat([v_image, v_text])
        )
        image_out = self.image_out(out_LBD[: lengths.image], image_lBD.shape[0])
        text_out = None
        if self.text_out is not None:
            text_out = self.text_out(out_LBD[lengths.image :], text_tBD.shape[0])
        return image_out, text_out


class ImageAttention(nn.Module):
    """The second attention of a dual-attention block: image tokens over image tokens."""

    def __init__(
        self, config: MMDiTConfig, mesh: Mesh, backend: Backend, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.backend = backend
        self.image = _Stream(config, mesh, backend, sequence_parallel, overlap="qkv")
        self.image_out = _Output(config, mesh, backend, sequence_parallel, overlap="proj")

    def forward(self, image_lBD: Tensor, lengths: Lengths) -> Tensor:
        out_LBD = self.backend.attention(*self.image(image_lBD, lengths.image))
        return self.image_out(out_LBD, image_lBD.shape[0])
