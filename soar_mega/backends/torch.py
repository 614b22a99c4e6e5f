"""The backend that runs anywhere: plain PyTorch.

Legend: L query tokens, S key tokens, B samples, D width, H heads, d head width; ``x_lBD`` is one
tensor rank's share of the tokens.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from soar_mega.parallel.collectives import (
    copy_to_tensor_ranks,
    gather_tokens,
    reduce_from_tensor_ranks,
    reduce_scatter_tokens,
)
from soar_mega.parallel.layout import ParameterLayout, new_parameter
from soar_mega.parallel.mesh import Mesh


class _Linear(nn.Module):
    """Local rows and columns of a linear layer, no communication."""

    def __init__(self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = new_parameter(weight, mesh)
        self.weight.data = self.weight.data.flatten(0, -2)
        self.bias = new_parameter(bias, mesh)
        self.bias.data = self.bias.data.flatten()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _ColumnLinear(_Linear):
    def __init__(
        self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh, sequence_parallel: bool
    ) -> None:
        super().__init__(weight, bias, mesh)
        self.enter = gather_tokens if sequence_parallel else copy_to_tensor_ranks

    def forward(self, x_lBD: Tensor) -> Tensor:
        return F.linear(self.enter(x_lBD, self.mesh), self.weight, self.bias)


class _RowLinear(_Linear):
    def __init__(
        self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh, sequence_parallel: bool
    ) -> None:
        super().__init__(weight, bias, mesh)
        self.leave = reduce_scatter_tokens if sequence_parallel else reduce_from_tensor_ranks

    def forward(self, x_LBD: Tensor) -> Tensor:
        if self.mesh.tensor_size == 1:
            return F.linear(x_LBD, self.weight, self.bias)
        # The bias joins after the sum, once.
        return self.leave(F.linear(x_LBD, self.weight), self.mesh) + self.bias


class _RMSNorm(nn.Module):
    def __init__(self, weight: ParameterLayout, mesh: Mesh, eps: float) -> None:
        super().__init__()
        self.weight = new_parameter(weight, mesh)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class TorchBackend:
    """See ``Backend``."""

    name = "torch"

    def column_linear(
        self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh, *, sequence_parallel: bool
    ) -> nn.Module:
        return _ColumnLinear(weight, bias, mesh, sequence_parallel)

    def row_linear(
        self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh, *, sequence_parallel: bool
    ) -> nn.Module:
        return _RowLinear(weight, bias, mesh, sequence_parallel)

    def linear(self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh) -> nn.Module:
        return _Linear(weight, bias, mesh)

    def rms_norm(self, weight: ParameterLayout, mesh: Mesh, eps: float) -> nn.Module:
        return _RMSNorm(weight, mesh, eps)

    def layer_norm(self, x_LBD: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x_LBD, (x_LBD.shape[-1],), eps=eps)

    def attention(self, q_LBHd: Tensor, k_SBHd: Tensor, v_SBHd: Tensor) -> Tensor:
        q_BHLd, k_BHSd, v_BHSd = (x.permute(1, 2, 0, 3) for x in (q_LBHd, k_SBHd, v_SBHd))
        out_BHLd = F.scaled_dot_product_attention(
            q_BHLd, k_BHSd, v_BHSd, scale=1.0 / math.sqrt(q_LBHd.shape[-1])
        )
        return out_BHLd.permute(2, 0, 1, 3).flatten(2)
