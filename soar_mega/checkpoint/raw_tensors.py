"""Tensors as plain bytes in files: the safetensors header, and reads and writes in pieces.

Files are read and written by plain calls, not mapped: mapped pages count as resident memory, and a
mapped file that shrinks kills the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from soar_mega.checkpoint.direct_file import DirectFile
from soar_mega.checkpoint.errors import CheckpointError, listing

T = TypeVar("T")

# Bytes of a tensor that are in memory at once. An export took 6% less of the processors' time so
# than with 32 MiB, which come fresh from the kernel each time.
PIECE = 8 * 2**20
# Bytes of one call that writes through the page cache. Measured on ext4 (Linux 6.18): 4 GiB in
# calls of 64 KiB cost 1.2 s of the kernel's time, of 1 MiB 2.5 s, of 32 MiB several times more.
CALL = 2**16
_SHORT_RUN = 2**16  # below this it is cheaper to read what lies between two runs, too
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


def header(
    plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and at which byte of the file each tensor begins.

    Args:
        plan: Key -> (shape, dtype), in the order in which their bytes follow.

    Raises:
        CheckpointError: A dtype the format does not know here.
    """
    unknown = [f"{key}: {dtype}" for key, (_, dtype) in plan.items() if dtype not in CODES]
    if unknown:
        raise CheckpointError("cannot be stored:" + listing("tensors of unknown dtype", unknown))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for key, (shape, dtype) in plan.items():
        starts[key] = end
        end += math.prod(shape) * dtype.itemsize
        entries[key] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[key], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: start + len(head) for key, start in starts.items()}


def regions(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Cut a tensor into regions of about ``PIECE`` bytes that follow each other row-major.

    Args:
        shape: Of the tensor.
        itemsize: Bytes of an element.
    """
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:]) * itemsize
    if row > PIECE:
        for index in range(shape[0]):
            for inner in regions(shape[1:], itemsize):
                yield (slice(index, index + 1), *inner)
        return
    rows = max(PIECE // max(row, 1), 1)
    for start in range(0, shape[0], rows):
        rest = (slice(0, size) for size in shape[1:])
        yield (slice(start, min(start + rows, shape[0])), *rest)


def read_ahead(pieces: Iterable[T]) -> Iterator[T]:
    """The same pieces, the next of which is read while the caller writes one."""
    source = iter(pieces)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, source, None)
        while (piece := coming.result()) is not None:
            coming = reader.submit(next, source, None)
            yield piece


def write_all(file: BinaryIO, data: Any) -> int:
    """Write a buffer of bytes to an unbuffered file; returns how many there were."""
    left = memoryview(data)
    call = len(left) if isinstance(file, DirectFile) else CALL
    while left:
        left = left[file.write(left[:call]) :]
    return len(memoryview(data))


def as_bytes(tensor: Tensor) -> Any:
    """A contiguous CPU tensor's memory as a writable buffer of bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()


def read_box(
    file: int, start: int, shape: tuple[int, ...], region: tuple[slice, ...], out: Tensor
) -> None:
    """Read a part of a box into a tensor.

    Args:
        file: Descriptor of the data file.
        start: First byte of the box.
        shape: Of the box.
        region: One slice with start and stop per dimension.
        out: CPU tensor of the region's shape and the stored dtype, of any strides; filled in place.

    Raises:
        OSError: The file ends before the box does, or cannot be read.
    """
    if out.numel() == 0:
        return
    item = out.element_size()
    whole_below = 0  # the number of leading dimensions that the region may cut
    for dim, (cut, size) in enumerate(zip(region, shape, strict=True)):
        if (cut.start, cut.stop) != (0, size):
            whole_below = dim + 1
    if not shape or whole_below <= 1:  # one run of bytes
        first = region[0].start * math.prod(shape[1:]) * item if shape else 0
        _read_run(file, start + first, out)
        return
    row = math.prod(shape[1:]) * item
    if row <= _SHORT_RUN:
        rows = max(PIECE // row, 1)
        for done in range(0, out.shape[0], rows):
            part = out[done : done + rows]
            lines = torch.empty((part.shape[0], *shape[1:]), dtype=out.dtype)
            _read_run(file, start + (region[0].start + done) * row, lines)
            part.copy_(lines[(slice(None), *region[1:])])
        return
    for index in range(region[0].start, region[0].stop):
        inner = out[index - region[0].start]
        read_box(file, start + index * row, shape[1:], region[1:], inner)


def _read_run(file: int, start: int, out: Tensor) -> None:
    """Fill ``out``, row-major, with consecutive bytes of the file."""
    if out.is_contiguous():
        _read_bytes(file, start, memoryview(as_bytes(out)))
    elif out.dim() > 1 and out.nbytes > PIECE:
        for index, inner in enumerate(out):
            _read_run(file, start + index * inner.nbytes, inner)
    else:
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        _read_bytes(file, start, memoryview(as_bytes(dense)))
        out.copy_(dense)


def _read_bytes(file: int, start: int, into: memoryview) -> None:
    while into:
        count = os.preadv(file, [into[:PIECE]], start)
        if count == 0:
            raise OSError(f"ends at byte {start}, {len(into)} bytes too early")
        start, into = start + count, into[count:]
