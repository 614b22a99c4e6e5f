"""Decoded pixels on their way to the encoders: on the host, or already on a GPU.

DALI decodes in a thread that runs ahead, on streams of its own, and takes its buffers back after a
batch. So its pictures are copied within the GPU into torch's memory (turning them upright needs a
copy anyway) on a stream that nothing else waits for, and the thread waits for that copy: whoever
gets a tensor may use it on any stream at once. ``stack_pixels`` tells torch's allocator of the
stream that does.

Legend: B pictures, H height, W width, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soar_mega.data.decode.geometry import Placement
from soar_mega.data.decode.interface import Pixels


def upright(pixels_HWC: Tensor, placement: Placement) -> Tensor:
    """``Placement.finish`` for a tensor, on its device; a contiguous copy."""
    swap, mirror_x, mirror_y = placement.turn
    if swap:
        pixels_HWC = pixels_HWC.transpose(0, 1)
    mirrored = [axis for axis, mirror in ((0, mirror_y), (1, mirror_x)) if mirror]
    if mirrored:  # flip copies, and keeps the order of strides
        return pixels_HWC.flip(mirrored).contiguous()
    return pixels_HWC.clone(memory_format=torch.contiguous_format)


class GpuHandover:
    """Takes batches from a pipeline on a GPU.

    Args:
        device_id: CUDA device.
    """

    def __init__(self, device_id: int) -> None:
        self._stream = torch.cuda.Stream(torch.device("cuda", device_id))

    def take(self, output: Any, placements: Sequence[Placement]) -> list[Tensor]:
        """uint8 (H, W, C) of each picture in torch's memory, finished when this returns.

        Args:
            output: DALI's ``TensorListGPU``; its buffers are free again afterwards.
            placements: Of its pictures.
        """
        with torch.cuda.stream(self._stream):  # also sets this thread's device
            # from_dlpack makes our stream wait for DALI's.
            views = [torch.from_dlpack(output[row]) for row in range(len(placements))]
            pairs = zip(views, placements, strict=True)
            finished = [upright(view, placement) for view, placement in pairs]
            self._stream.synchronize()
        return finished


def stack_pixels(pixels: Sequence[Pixels], device: torch.device) -> Tensor:
    """Pictures of one size, from the host or ``device``, as uint8 (B, H, W, C) on ``device``."""
    on_host = [one for one in pixels if isinstance(one, np.ndarray)]
    if len(on_host) == len(pixels):
        batch_BHWC = torch.from_numpy(np.stack(on_host))
        if device.type == "cuda":
            batch_BHWC = batch_BHWC.pin_memory().to(device, non_blocking=True)
        return batch_BHWC
    batch_BHWC = torch.empty(len(pixels), *pixels[0].shape, dtype=torch.uint8, device=device)
    for row, one in enumerate(pixels):
        batch_BHWC[row] = torch.from_numpy(one) if isinstance(one, np.ndarray) else one
        if isinstance(one, Tensor) and one.is_cuda:
            # It was allocated for another stream: its memory must not be given away before this
            # one has read it.
            one.record_stream(torch.cuda.current_stream(one.device))
    return batch_BHWC
