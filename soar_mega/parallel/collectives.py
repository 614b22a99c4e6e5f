"""Tensor- and sequence-parallel communication as differentiable functions.

Each is the identity (or a plain reshape) on a mesh of tensor size 1. Sequence-first tensors: the
sequence is dimension 0. On the meta device they give the right shapes and need no process group;
what they would send shows as an operation of ``torch.ops._c10d_functional``.

Legend: L tokens, B samples, D width; ``x_LBD`` is whole on every tensor rank, ``x_lBD`` is one
rank's share of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh

# torch 2.13 renamed the two calls and warns about the old names, which 2.11 alone knows.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_PEERS = "tensor-parallel peers"
_on_meta = torch.ops._c10d_functional
_tracing = torch.compiler.is_compiling
_group_named: Any = c10d._resolve_process_group  # torch 2.13 has a type for the name, 2.11 not


def _all_reduce(x: Tensor, mesh: Mesh) -> Tensor:
    if x.is_meta:
        return _on_meta.all_reduce(x, "sum", "tensor")
    return _traced_all_reduce(x, _name(mesh)) if _tracing() else _reduced(x, mesh.tensor_group)


def _all_gather(x: Tensor, mesh: Mesh) -> Tensor:
    if x.is_meta:
        return _on_meta.all_gather_into_tensor(x, mesh.tensor_size, "tensor")
    parts = x, mesh.tensor_size
    return _traced_gather(*parts, _name(mesh)) if _tracing() else _gather(*parts, mesh.tensor_group)


def _reduce_scatter(x: Tensor, mesh: Mesh) -> Tensor:
    if x.is_meta:
        return _on_meta.reduce_scatter_tensor(x, "sum", mesh.tensor_size, "tensor")
    parts = x, mesh.tensor_size
    if _tracing():
        return _traced_scatter(*parts, _name(mesh))
    return _scattered(*parts, mesh.tensor_group)


def _reduced(x: Tensor, group: ProcessGroup | None) -> Tensor:
    x = x.contiguous() if not x.is_contiguous() else x.clone()
    with waiting_for(_PEERS):
        dist.all_reduce(x, group=group)
    return x


def _gather(x: Tensor, size: int, group: ProcessGroup | None) -> Tensor:
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    with waiting_for(_PEERS):
        all_gather_into(out, x.contiguous(), group=group)
    return out


def _scattered(x: Tensor, size: int, group: ProcessGroup | None) -> Tensor:
    out = x.new_empty((x.shape[0] // size, *x.shape[1:]))
    with waiting_for(_PEERS):
        reduce_scatter_into(out, x.contiguous(), group=group)
    return out


def _own_share(x: Tensor, mesh: Mesh) -> Tensor:
    return x.chunk(mesh.tensor_size, dim=0)[mesh.tensor_rank].contiguous()


class _Copy(torch.autograd.Function):
    """Forward: as is. Backward: sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.mesh), None


class _Reduce(torch.autograd.Function):
    """Forward: sum over the group. Backward: as is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        return _all_reduce(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Forward: all shares on every rank. Backward: reduce-scatter, or one's own share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, partial_gradient: bool) -> Tensor:
        ctx.mesh, ctx.partial_gradient = mesh, partial_gradient
        return _all_gather(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        back = _reduce_scatter if ctx.partial_gradient else _own_share
        return back(grad, ctx.mesh), None, None


class _ReduceScatter(torch.autograd.Function):
    """Forward: sum over the group, keep one's share. Backward: all shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return _reduce_scatter(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.mesh), None


def copy_to_tensor_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Entry of a column-parallel region: the same input everywhere, gradients summed."""
    return x if mesh.tensor_size == 1 else _Copy.apply(x, mesh)


def reduce_from_tensor_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Exit of a row-parallel region: partial outputs summed on every rank."""
    return x if mesh.tensor_size == 1 else _Reduce.apply(x, mesh)


def gather_tokens(x_lBD: Tensor, mesh: Mesh, *, partial_gradient: bool = True) -> Tensor:
    """All tokens from every rank's share, in rank order.

    Args:
        partial_gradient: True where each rank's later work contributes only its own part of the
            gradient (a column-parallel linear follows); False where all ranks compute the same.
    """
    if mesh.tensor_size == 1:
        return x_lBD
    return _Gather.apply(x_lBD, mesh, partial_gradient)


def reduce_scatter_tokens(x_LBD: Tensor, mesh: Mesh) -> Tensor:
    """Exit of a row-parallel region with sequence parallel: sums, each rank keeping its tokens."""
    return x_LBD if mesh.tensor_size == 1 else _ReduceScatter.apply(x_LBD, mesh)


def padded_length(length: int, shares: int, multiple: int) -> int:
    """``length`` rounded up so that ``shares`` equal shares are multiples of ``multiple``."""
    return -(-length // (shares * multiple)) * shares * multiple


def pad_tokens(x_LBD: Tensor, length: int) -> Tensor:
    """Zero rows appended up to ``length`` tokens."""
    missing = length - x_LBD.shape[0]
    return x_LBD if missing == 0 else F.pad(x_LBD, (0, 0) * (x_LBD.dim() - 1) + (0, missing))


# A compiler sees a collective as one operator that it cannot look into; what names the group to it
# is a word, which is the same for all blocks.


def _name(mesh: Mesh) -> str:
    assert mesh.tensor_group is not None
    return mesh.tensor_group.group_name


@torch.library.custom_op("soar_mega::all_reduce", mutates_args=())
def _traced_all_reduce(x: Tensor, group: str) -> Tensor:
    return _reduced(x, _group_named(group))


@_traced_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("soar_mega::all_gather", mutates_args=())
def _traced_gather(x: Tensor, size: int, group: str) -> Tensor:
    return _gather(x, size, _group_named(group))


@_traced_gather.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty((size * x.shape[0], *x.shape[1:]))


@torch.library.custom_op("soar_mega::reduce_scatter", mutates_args=())
def _traced_scatter(x: Tensor, size: int, group: str) -> Tensor:
    return _scattered(x, size, _group_named(group))


@_traced_scatter.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty((x.shape[0] // size, *x.shape[1:]))
