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
    """

    global_shape: tuple[int, ...]
    tensor_dim: int | None = None
    gradient: GradientKind = "replicated"

    def local_shape(self, tensor_size: int) -> tuple[int, ...]:
        """Shape of one rank's slice."""
        shape = list(self.global_shape)
        if self.tensor_dim is not None:
            if shape[self.tensor_dim] % tensor_size:
                raise ValueError(
                    f"dimension {self.tensor_dim} of {self.global_shape} does not divide by the "
                    f"tensor-parallel size {tensor_size}"
                )
            shape[self.tensor_dim] //= tensor_size
        return tuple(shape)

    def local_offset(self, mesh: Mesh) -> tuple[int, ...]:
        """Where this rank's slice starts in the global parameter."""
        offset = [0] * len(self.global_shape)
        if self.tensor_dim is not None:
            offset[self.tensor_dim] = (
                self.local_shape(mesh.tensor_size)[self.tensor_dim] * mesh.tensor_rank
            )
        return tuple(offset)


def local_slice(layout: ParameterLayout, mesh: Mesh) -> tuple[slice, ...]:
    """The index that cuts this rank's part out of the global parameter."""
    shape = layout.local_shape(mesh.tensor_size)
    offset = layout.local_offset(mesh)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def new_parameter(
    layout: ParameterLayout, mesh: Mesh, dtype: torch.dtype = torch.float32
) -> nn.Parameter:
    """An uninitialised local parameter with its layout attached."""
    shape = layout.local_shape(mesh.tensor_size)
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=mesh.device))
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
