"""The backend that runs anywhere: plain PyTorch.

Legend: L query tokens, S key tokens, B samples, D width, H heads, d head width; ``x_lBD`` is one
tensor rank's share of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soar_mega.backends import Overlap, WeightWork
from soar_mega.backends.elementwise import Elementwise
from soar_mega.backends.weight_gradients import WeightGradients, adding_linear
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

    def __init__(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        gradients: WeightGradients,
    ) -> None:
        super().__init__()
        self.mesh, self.gradients = mesh, gradients
        self.weight = new_parameter(weight, mesh)
        self.weight.data = self.weight.data.flatten(0, -2)
        self.bias = new_parameter(bias, mesh)
        self.bias.data = self.bias.data.flatten()
        gradients.add(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if hasattr(self.weight, "main_grad") and torch.is_grad_enabled():
            return adding_linear(x, self.weight, bias, self.gradients)
        return F.linear(x, self.weight, bias)


class _ColumnLinear(_Linear):
    def __init__(self, *parts: Any, sequence_parallel: bool) -> None:
        super().__init__(*parts)
        self.enter = gather_tokens if sequence_parallel else copy_to_tensor_ranks

    def forward(self, x_lBD: Tensor) -> Tensor:
        return super().forward(self.enter(x_lBD, self.mesh))


class _RowLinear(_Linear):
    def __init__(self, *parts: Any, sequence_parallel: bool) -> None:
        super().__init__(*parts)
        self.leave = reduce_scatter_tokens if sequence_parallel else reduce_from_tensor_ranks

    def forward(self, x_LBD: Tensor) -> Tensor:
        if self.mesh.tensor_size == 1:
            return super().forward(x_LBD)
        # The bias joins after the sum, once.
        return self.leave(self._product(x_LBD, None), self.mesh) + self.bias


class _ExactRMSNorm(torch.autograd.Function):
    """RMS norm in the input's own precision, with a backward written out.

    On a CPU torch composes the norm of ten operations each way and keeps what each needs: this
    takes 0.77 of the time (2.25 against 2.91 ms both ways, 410 tokens, 4 samples, 4 heads of 64).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt((x * x).mean(dim=-1, keepdim=True).add_(eps))
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        weight_grad = (grad * normed).flatten(0, -2).sum(dim=0)
        grad = grad * weight
        along = (grad * normed).mean(dim=-1, keepdim=True)
        return grad.sub_(normed * along).mul_(scale), weight_grad, None


class _RMSNorm(nn.Module):
    def __init__(self, weight: ParameterLayout, mesh: Mesh, eps: float) -> None:
        super().__init__()
        self.weight = new_parameter(weight, mesh)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        composed = torch.compiler.is_compiling()  # a compiler fuses the norm with what is around it
        if not composed and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
            result: Tensor = _ExactRMSNorm.apply(x, self.weight, self.eps)
            return result
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class TorchBackend:
    """See ``Backend``."""

    name = "torch"
    token_multiple = 1

    def __init__(self) -> None:
        self.elementwise = Elementwise()
        self._gradients = WeightGradients()

    def for_layer(self, layer: int) -> TorchBackend:
        return self

    def precision(self) -> AbstractContextManager[None]:
        return nullcontext()

    def checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        # The model draws no random numbers, so there is no generator state to put back.
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    def training_step(self, watch: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def forget_step(self) -> None:
        pass

    def statistics(self) -> dict[str, Tensor]:
        return {}

    def hold_weight_gradients(self) -> AbstractContextManager[WeightWork]:
        return self._gradients.hold()

    def column_linear(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        *,
        sequence_parallel: bool,
        overlap: Overlap | None = None,
    ) -> nn.Module:
        parts = (weight, bias, mesh, self._gradients)
        return _ColumnLinear(*parts, sequence_parallel=sequence_parallel)

    def row_linear(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        *,
        sequence_parallel: bool,
        overlap: Overlap | None = None,
    ) -> nn.Module:
        parts = (weight, bias, mesh, self._gradients)
        return _RowLinear(*parts, sequence_parallel=sequence_parallel)

    def linear(self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh) -> nn.Module:
        return _Linear(weight, bias, mesh, self._gradients)

    def rms_norm(self, weight: ParameterLayout, mesh: Mesh, eps: float) -> nn.Module:
        return _RMSNorm(weight, mesh, eps)

    def attention(self, q_LBHd: Tensor, k_SBHd: Tensor, v_SBHd: Tensor) -> Tensor:
        q_BHLd, k_BHSd, v_BHSd = (x.permute(1, 2, 0, 3) for x in (q_LBHd, k_SBHd, v_SBHd))
        out_BHLd = F.scaled_dot_product_attention(
            q_BHLd, k_BHSd, v_BHSd, scale=1.0 / math.sqrt(q_LBHd.shape[-1])
        )
        return out_BHLd.permute(2, 0, 1, 3).flatten(2)
