"""How a local parameter lies in the global one.

Parameters are plain local tensors. The layout attached to each says what it is a slice of, which is
all that checkpoints, converters, gradient reduction and the gradient norm need to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from soar_mega.parallel.mesh import Mesh

GradientKind = Literal["sharded", "replicated", "partial"]


@dataclass(frozen=True)
class ParameterLayout:
    """The place of a local parameter in the global one.

    Attributes:
        global_shape: Shape of the whole parameter.
        tensor_dim: The dimension cut into ``tensor_size`` equal contiguous slices, slice number
            ``tensor_rank`` being local; None where every tensor rank holds the whole.
        gradient: ``sharded``: each rank has the gradient of its own slice. ``replicated``: every
            tensor rank computes the same whole gradient. ``partial``: every tensor rank sees some
            tokens or heads only, so gradients are summed over the tensor group.
        block: None: the slices must be equal as they are. A number: the dimension is cut between
            blocks of that many elements (an attention head), ``ceil(blocks / tensor_size)`` a
            slice; what the last slices lack, their padding, is zeros.
    """

    global_shape: tuple[int, ...]
    tensor_dim: int | None = None
    gradient: GradientKind = "replicated"
    block: int | None = None

    def local_shape(self, tensor_size: int) -> tuple[int, ...]:
        """Shape of one rank's slice, padding included: equal on all ranks."""
        shape = list(self.global_shape)
        if self.tensor_dim is not None:
            whole, block = shape[self.tensor_dim], self.block or 1
            if whole % block or (self.block is None and whole % tensor_size):
                raise ValueError(
                    f"dimension {self.tensor_dim} of {self.global_shape} does not divide by the "
                    + (f"block {block}" if self.block else f"tensor-parallel size {tensor_size}")
                )
            shape[self.tensor_dim] = -(-whole // (block * tensor_size)) * block
        return tuple(shape)

    def real_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of this rank's slice without padding, which is at its end along ``tensor_dim``."""
        shape = list(self.local_shape(mesh.tensor_size))
        if self.tensor_dim is not None:
            left = self.global_shape[self.tensor_dim] - self.local_offset(mesh)[self.tensor_dim]
            shape[self.tensor_dim] = min(shape[self.tensor_dim], left)
        return tuple(shape)

    def local_offset(self, mesh: Mesh) -> tuple[int, ...]:
        """Where this rank's slice starts in the global parameter; its end, if all is padding."""
        offset = [0] * len(self.global_shape)
        if self.tensor_dim is not None:
            start = self.local_shape(mesh.tensor_size)[self.tensor_dim] * mesh.tensor_rank
            offset[self.tensor_dim] = min(start, self.global_shape[self.tensor_dim])
        return tuple(offset)


def local_slice(layout: ParameterLayout, mesh: Mesh) -> tuple[slice, ...]:
    """The index that cuts this rank's part, without padding, out of the global parameter."""
    shape, offset = layout.real_shape(mesh), layout.local_offset(mesh)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def real_part(local: Tensor, layout: ParameterLayout, mesh: Mesh) -> Tensor:
    """What ``local_slice`` means, as a view of a local tensor: its elements without padding.

    Args:
        local: A parameter or its like, row-major, of the layout's local shape or a flattened one.
        layout: The parameter's place among the tensor ranks.
        mesh: This process.
    """
    whole = local.view(layout.local_shape(mesh.tensor_size))
    return whole[tuple(slice(0, size) for size in layout.real_shape(mesh))]


@torch.no_grad()
def fill_parameter(parameter: Tensor, mesh: Mesh, values: Tensor) -> None:
    """Set a local parameter in place, its padding to zeros.

    Args:
        parameter: Made by ``new_parameter``.
        mesh: This process.
        values: What ``local_slice`` cuts out of the global parameter.
    """
    layout = layout_of(parameter)
    parameter.zero_()
    real_part(parameter, layout, mesh).copy_(values)


def new_parameter(
    layout: ParameterLayout, mesh: Mesh, dtype: torch.dtype = torch.float32
) -> nn.Parameter:
    """A local parameter with its layout attached; its padding is zeros, the rest uninitialised."""
    shape = layout.local_shape(mesh.tensor_size)
    padded = layout.real_shape(mesh) != shape
    # Weights read from a checkpoint fill what is real only.
    make = torch.zeros if padded else torch.empty
    parameter = nn.Parameter(make(shape, dtype=dtype, device=mesh.device))
    parameter.parallel_layout = layout  # type: ignore[attr-defined]
    return parameter


def layout_of(parameter: Tensor) -> ParameterLayout:
    """The layout attached to a parameter of the model.

    Raises:
        AttributeError: The parameter was not made by ``new_parameter``.
    """
    return cast(ParameterLayout, parameter.parallel_layout)  # type: ignore[attr-defined]


def parameter_layouts(module: nn.Module) -> dict[str, ParameterLayout]:
    """Name -> layout of every parameter of ``module``, in registration order."""
    return {name: layout_of(parameter) for name, parameter in module.named_parameters()}
