"""Sharded data parallel: flat buffers, one gather of parameters and one reduction of gradients a
step.

All parameters of a process, of one pipeline stage or several, lie in one flat buffer in the compute
dtype, their gradients in one flat fp32 buffer (``main_grad``) that every backward adds into. After
the step's last backward the gradients are reduce-scattered over the data-parallel ranks; each rank
owns one contiguous share of the buffer: fp32 master weights, optimizer state and EMA exist only
there. ``publish`` gathers the updated weights.

The buffer holds sharded parameters first, then replicated, then partial ones (see ParameterLayout),
so that the sum over tensor ranks and the gradient norm work on contiguous ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soar_mega.parallel.collectives import all_gather_into, reduce_scatter_into
from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.layout import GradientKind, ParameterLayout, layout_of
from soar_mega.parallel.mesh import Mesh

# Parameters start on 64-element borders (256 bytes in fp32), as fused GPU kernels like them.
_ALIGNMENT = 64
# Elements whose norm is taken at once.
_NORM_PIECE = 2**22
_ORDER: dict[GradientKind, int] = {"sharded": 0, "replicated": 1, "partial": 2}


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that lies in this data-parallel rank's share.

    Attributes:
        name, layout: The parameter.
        start, stop: Range of the row-major local (tensor-parallel) parameter.
        shard_start: Where the range begins in this rank's share.
    """

    name: str
    layout: ParameterLayout
    start: int
    stop: int
    shard_start: int


class ShardedParameters:
    """The flat buffers of everything a process owns of the model.

    Args:
        modules: Their parameters, whose names must differ, are moved into the flat buffer (they
            become views of it).
        mesh: Where this process stands.
        dtype: Compute dtype of the parameters; the master share is at least fp32.
        reduce_dtype: Dtype in which gradients travel between data-parallel ranks.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        mesh: Mesh,
        dtype: torch.dtype = torch.float32,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.mesh = mesh
        self.dtype = dtype
        self.reduce_dtype = reduce_dtype
        self.master_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._parameters = sorted(
            (item for module in modules for item in module.named_parameters()),
            key=lambda item: _ORDER[layout_of(item[1]).gradient],
        )
        self._start: dict[str, int] = {}
        self._range = {kind: (0, 0) for kind in _ORDER}
        offset = 0
        for kind in _ORDER:
            first = offset
            for name, parameter in self._parameters:
                if layout_of(parameter).gradient == kind:
                    self._start[name] = offset
                    offset += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            self._range[kind] = (first, offset)
        self.shard_size = -(-offset // (mesh.data_size * _ALIGNMENT)) * _ALIGNMENT
        self.total_size = self.shard_size * mesh.data_size
        self._make_buffers()

    def _make_buffers(self) -> None:
        device = self.mesh.device
        self.flat = torch.zeros(self.total_size, dtype=self.dtype, device=device)
        self.flat_grad = torch.zeros(self.total_size, dtype=self.master_dtype, device=device)
        self.master_shard = self.flat[self.own_range]
        if self.dtype != self.master_dtype:
            self.master_shard = torch.zeros_like(self.master_shard, dtype=self.master_dtype)
        # The master share is taken before the parameters are rounded to the compute dtype.
        originals = {name: parameter.data for name, parameter in self._parameters}
        for piece in self.fragments():
            target = self.master_shard[piece.shard_start :][: piece.stop - piece.start]
            target.copy_(originals[piece.name].flatten()[piece.start : piece.stop])
        for name, parameter in self._parameters:
            view = self._view(self.flat, name, parameter)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.main_grad = self._view(self.flat_grad, name, parameter)  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_add_into_main_grad)

    def _view(self, flat: Tensor, name: str, parameter: nn.Parameter) -> Tensor:
        start = self._start[name]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    @property
    def own_range(self) -> slice:
        """This data-parallel rank's share of the flat buffers."""
        start = self.mesh.data_rank * self.shard_size
        return slice(start, start + self.shard_size)

    def fragments(self) -> Iterator[Fragment]:
        """The pieces of parameters in this rank's share, for checkpoints."""
        own = self.own_range
        for name, parameter in self._parameters:
            first = self._start[name]
            start, stop = max(first, own.start), min(first + parameter.numel(), own.stop)
            if start < stop:
                yield Fragment(
                    name, layout_of(parameter), start - first, stop - first, start - own.start
                )

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step."""
        self.flat_grad.zero_()

    def reduce_gradients(self) -> Tensor:
        """Sum gradients over tensor ranks (partial ones) and data ranks; this rank's share."""
        first, last = self._range["partial"]
        if self.mesh.tensor_group is not None and last > first:
            with waiting_for("tensor-parallel peers, to sum gradients"):
                dist.all_reduce(self.flat_grad[first:last], group=self.mesh.tensor_group)
        if self.mesh.data_group is None:
            return self.flat_grad
        sent = self.flat_grad.to(self.reduce_dtype)
        shard = sent.new_empty(self.shard_size)
        with waiting_for("data-parallel peers, to sum gradients"):
            reduce_scatter_into(shard, sent, group=self.mesh.data_group)
        return shard.to(self.master_dtype)

    def gradient_norm(self, grad_shard: Tensor) -> Tensor:
        """Norm of the whole model's gradient (0-d fp64), the same bits on every rank."""
        counted = self.total_size if self.mesh.tensor_rank == 0 else self._range["sharded"][1]
        stop = min(max(counted - self.own_range.start, 0), self.shard_size)
        squared = squared_norm(grad_shard[:stop])
        if self.mesh.world_group is not None:
            with waiting_for("every other process, to sum the gradient norm"):
                dist.all_reduce(squared, group=self.mesh.world_group)
        return squared.sqrt()

    def publish(self, shard: Tensor | None = None) -> None:
        """Give every data-parallel rank the weights.

        Args:
            shard: What to publish instead of the master share. In fp32 this overwrites the master
                share, which is the parameters' own memory: see ``borrow``.
        """
        own = self.flat[self.own_range]
        source = self.master_shard if shard is None else shard
        if own.data_ptr() != source.data_ptr():
            own.copy_(source)
        if self.mesh.data_group is not None:
            with waiting_for("data-parallel peers, to gather weights"):
                all_gather_into(self.flat, own.clone(), group=self.mesh.data_group)

    def borrow(self, shard: Tensor) -> _Borrowed:
        """Context in which the model computes with ``shard`` (the EMA), not the master share."""
        return _Borrowed(self, shard)


def squared_norm(values: Tensor) -> Tensor:
    """Sum of squares of a 1-D tensor, 0-d fp64.

    In pieces, because torch copies what it takes the norm of to fp64: of SD3.5-Medium's whole
    gradient that is 18 GB, more than the activations of a step.
    """
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in values.split(_NORM_PIECE)
    ]
    return torch.stack(norms).square().sum()


class _Borrowed:
    """Swaps a share in, and the master share back; in fp32 the master is the parameters' memory."""

    def __init__(self, parameters: ShardedParameters, shard: Tensor) -> None:
        self._parameters, self._shard = parameters, shard

    def __enter__(self) -> None:
        self._kept = self._parameters.master_shard.clone()
        self._parameters.publish(self._shard)

    def __exit__(self, *_: object) -> None:
        self._parameters.master_shard.copy_(self._kept)
        self._parameters.publish()


def _add_into_main_grad(parameter: Tensor) -> None:
    if parameter.grad is None:  # the operation added its part itself, as linears do
        return
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
