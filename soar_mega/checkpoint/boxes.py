"""Pieces of a global tensor as n-dimensional boxes, as torch's distributed checkpoint stores them.

A data-parallel rank owns a contiguous flat range of a tensor-parallel (local) parameter. Such a
range of a row-major tensor is a short list of boxes: a part of a row, whole rows, a part of a row,
and so on inwards. Each box, clipped to what is no padding and moved by the offset of the
tensor-parallel slice, is a chunk of the global tensor, so any layout's pieces can be read back by
any other layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh


def range_to_boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the flat range ``[start, stop)`` of a row-major tensor into boxes.

    Args:
        shape: Shape of the tensor; ``()`` for a scalar.
        start, stop: Element range, ``0 <= start``, ``stop <= prod(shape)``; empty if stop <= start.

    Returns:
        ``(offset, size, flat_start)`` of each box in row-major order: its corner and extent in the
        tensor, and where its elements begin, counted from ``start``. The boxes cover the range
        exactly once and each is contiguous in memory. At most ``2 * len(shape) - 1`` boxes.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), (), 0)]
    if len(shape) == 1:
        return [((start,), (stop - start,), 0)]
    row = math.prod(shape[1:])
    first_full, last_full = -(-start // row), stop // row
    if first_full > last_full:  # the range lies strictly inside one row
        return _inside_row(shape, first_full - 1, start, stop, start)
    boxes = _inside_row(shape, first_full - 1, start, first_full * row, start)
    if last_full > first_full:
        offset = (first_full, *(0 for _ in shape[1:]))
        boxes.append((offset, (last_full - first_full, *shape[1:]), first_full * row - start))
    return boxes + _inside_row(shape, last_full, last_full * row, stop, start)


def _inside_row(
    shape: tuple[int, ...], index: int, start: int, stop: int, origin: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    row = math.prod(shape[1:])
    inner = range_to_boxes(shape[1:], start - index * row, stop - index * row)
    return [((index, *offset), (1, *size), flat + start - origin) for offset, size, flat in inner]


@dataclass(frozen=True)
class Box:
    """One chunk of a global tensor held by this process.

    Attributes:
        offset: Corner in the global tensor.
        shape: Extent.
        data: View of the elements, of this shape and any strides; saved from, and loaded into in
            place.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    data: Tensor


class BoxedTensor:
    """This process's pieces of one global tensor, in the protocol of torch's DCP.

    Args:
        global_shape: Shape of the whole tensor.
        boxes: The pieces; none is fine.
        contribute: Whether this process writes its pieces when saving. Exactly one of the processes
            holding the same piece may; all of them read when loading.
        constant: Whether training never changes it, so that no copy is needed to write it later.
    """

    def __init__(
        self,
        global_shape: tuple[int, ...],
        boxes: list[Box],
        contribute: bool = True,
        constant: bool = False,
    ) -> None:
        self.global_shape = tuple(global_shape)
        self.boxes = boxes
        self.contribute = contribute
        self.constant = constant
        for box in boxes:
            if tuple(box.data.shape) != box.shape:
                raise ValueError(
                    f"box {box.offset} + {box.shape} of {self.global_shape} needs a tensor of that "
                    f"shape, got {tuple(box.data.shape)}"
                )

    @classmethod
    def whole(cls, tensor: Tensor, contribute: bool = True, constant: bool = False) -> BoxedTensor:
        """A tensor this process holds completely (any shape and strides)."""
        shape = tuple(tensor.shape)
        return cls(shape, [Box((0,) * len(shape), shape, tensor)], contribute, constant)

    @classmethod
    def from_range(
        cls, layout: ParameterLayout, mesh: Mesh, start: int, stop: int, data: Tensor
    ) -> BoxedTensor:
        """The flat range ``[start, stop)`` of this rank's tensor-parallel slice of a parameter.

        Padding in the range belongs to no box: it is neither saved nor loaded.

        Args:
            layout: The parameter's place among the tensor ranks.
            mesh: This process; tensor rank 0 alone writes what all tensor ranks hold.
            start, stop: Range of the row-major local parameter.
            data: Its ``stop - start`` elements, a 1-D view (master weight, EMA, Adam moment).
        """
        corner, real = layout.local_offset(mesh), layout.real_shape(mesh)
        boxes = []
        for offset, size, flat in range_to_boxes(layout.local_shape(mesh.tensor_size), start, stop):
            kept = tuple(min(a, b - o) for a, b, o in zip(size, real, offset, strict=True))
            if min(kept, default=1) <= 0:
                continue
            view = data[flat : flat + math.prod(size)].view(size)
            place = tuple(a + b for a, b in zip(corner, offset, strict=True))
            boxes.append(Box(place, kept, view[tuple(slice(0, n) for n in kept)]))
        contribute = layout.tensor_dim is not None or mesh.tensor_rank == 0
        return cls(layout.global_shape, boxes, contribute)

    def size(self) -> torch.Size:
        """Shape of the global tensor (the load planner compares it with the stored one)."""
        return torch.Size(self.global_shape)

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        if not self.contribute:
            return []
        return [
            WriteItem(
                index=MetadataIndex(fqn, box.offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box),
                    properties=TensorProperties(dtype=box.data.dtype),
                    size=self.size(),
                ),
            )
            for box in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box in self.boxes:
            if index.offset == torch.Size(box.offset):
                return box.data
        raise ValueError(f"no piece of '{index.fqn}' begins at {index.offset} in this process")


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=torch.Size(box.shape))
