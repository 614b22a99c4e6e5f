"""Host copies of a state, so that training goes on while they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from soar_mega.checkpoint.boxes import Box, BoxedTensor


class Stage:
    """Buffers on the host that hold this process's part of a state.

    They are made at the first copy and used again, because fresh memory costs more than the copy.
    Tensors that are constant, or that this process does not write, are not copied.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}

    def copy(self, tensors: Mapping[str, BoxedTensor]) -> dict[str, BoxedTensor]:
        """The same state as it is now, in the buffers of the last copy.

        Args:
            tensors: Of the same shapes each time.
        """
        moving = {k: t for k, t in tensors.items() if t.contribute and not t.constant}
        self._make_room(moving)
        used = dict.fromkeys(self._buffers, 0)
        staged = {
            name: tensor if tensor.constant else BoxedTensor(tensor.global_shape, [], False)
            for name, tensor in tensors.items()
            if name not in moving
        }
        on_device = False
        for name, tensor in moving.items():
            boxes = []
            for box in tensor.boxes:
                first = used[box.data.dtype]
                used[box.data.dtype] = stop = first + math.prod(box.shape)
                target = self._buffers[box.data.dtype][first:stop].view(box.shape)
                target.copy_(box.data, non_blocking=True)
                on_device |= box.data.is_cuda
                boxes.append(Box(box.offset, box.shape, target))
            staged[name] = BoxedTensor(tensor.global_shape, boxes)
        if on_device:
            torch.cuda.synchronize()
        return staged

    def _make_room(self, tensors: Mapping[str, BoxedTensor]) -> None:
        sizes: dict[torch.dtype, int] = {}
        on_device = False
        for tensor in tensors.values():
            for box in tensor.boxes:
                sizes[box.data.dtype] = sizes.get(box.data.dtype, 0) + math.prod(box.shape)
                on_device |= box.data.is_cuda
        for dtype, size in sizes.items():
            if dtype not in self._buffers or self._buffers[dtype].numel() < size:
                self._buffers[dtype] = torch.empty(size, dtype=dtype, pin_memory=on_device)
