"""Tensors as plain bytes in files: the safetensors header, and reads and writes in pieces.

Tensors are numpy arrays here and dtypes the codes of the safetensors format, so that a converter
need not import torch; ``torch_arrays`` leads from one to the other.

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

import numpy as np
from numpy.typing import NDArray

from soar_mega.checkpoint.direct_file import DirectFile
from soar_mega.checkpoint.errors import CheckpointError, listing

T = TypeVar("T")
Array = NDArray[Any]
Plan = Mapping[str, tuple[tuple[int, ...], str]]  # key -> (shape, dtype), in writing order

# Bytes of a tensor that are in memory at once. An export took 6% less of the processors' time so
# than with 32 MiB, which come fresh from the kernel each time.
PIECE = 8 * 2**20
# Bytes of one call that writes through the page cache. Measured on ext4 (Linux 6.18): 4 GiB in
# calls of 64 KiB cost 1.2 s of the kernel's time, of 1 MiB 2.5 s, of 32 MiB several times more.
CALL = 2**16
_SHORT_RUN = 2**16  # below this it is cheaper to read what lies between two runs, too
# Code -> an array's dtype, another for each. numpy knows no bfloat16: those are kept as bits.
STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def byte_count(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * STORAGE[dtype].itemsize


def header(plan: Plan) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and at which byte of the file each tensor begins.

    Raises:
        CheckpointError: A dtype the format does not know here.
    """
    unknown = [f"{key}: {dtype}" for key, (_, dtype) in plan.items() if dtype not in STORAGE]
    if unknown:
        raise CheckpointError("cannot be stored:" + listing("tensors of unknown dtype", unknown))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for key, (shape, dtype) in plan.items():
        starts[key] = end
        end += byte_count(shape, dtype)
        entries[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [starts[key], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: start + len(head) for key, start in starts.items()}


def regions(shape: tuple[int, ...], dtype: str) -> Iterator[tuple[slice, ...]]:
    """Cut a tensor into regions of about ``PIECE`` bytes that follow each other row-major."""
    if not shape:
        yield ()
        return
    row = byte_count(shape[1:], dtype)
    if row > PIECE:
        for index in range(shape[0]):
            for inner in regions(shape[1:], dtype):
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


def write_all(file: BinaryIO, data: bytes | memoryview) -> int:
    """Write bytes to an unbuffered file; returns how many there were."""
    left = memoryview(data)
    call = len(left) if isinstance(file, DirectFile) else CALL
    while left:
        left = left[file.write(left[:call]) :]
    return len(data)


def as_bytes(array: Array) -> memoryview:
    """A contiguous array's memory as bytes, writable."""
    return array.reshape(-1).view(np.uint8).data


def cast(array: Array, dtype: str) -> Array:
    """An array's numbers in this dtype, rounded as torch does; itself if it has the dtype."""
    if array.dtype == STORAGE[dtype]:
        return array
    # Not above: torch takes longer to import than a small model to convert.
    from soar_mega.checkpoint.torch_arrays import DTYPES, as_array, as_tensor

    return as_array(as_tensor(array).to(DTYPES[dtype]))


def read_box(
    file: int, start: int, shape: tuple[int, ...], region: tuple[slice, ...], out: Array
) -> None:
    """Read a part of a box into an array.

    Args:
        file: Descriptor of the data file.
        start: First byte of the box.
        shape: Of the box.
        region: One slice with start and stop per dimension.
        out: Array of the region's shape and the stored dtype, of any strides; filled in place.

    Raises:
        OSError: The file ends before the box does, or cannot be read.
    """
    if out.size == 0:
        return
    item = out.itemsize
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
            lines = np.empty((part.shape[0], *shape[1:]), out.dtype)
            _read_run(file, start + (region[0].start + done) * row, lines)
            part[...] = lines[(slice(None), *region[1:])]
        return
    for index in range(region[0].start, region[0].stop):
        inner = out[index - region[0].start]
        read_box(file, start + index * row, shape[1:], region[1:], inner)


def _read_run(file: int, start: int, out: Array) -> None:
    """Fill ``out``, row-major, with consecutive bytes of the file."""
    if out.flags.c_contiguous:
        _read_bytes(file, start, as_bytes(out))
    elif out.ndim > 1 and out.nbytes > PIECE:
        for index, inner in enumerate(out):
            _read_run(file, start + index * inner.nbytes, inner)
    else:
        dense = np.empty(out.shape, out.dtype)
        _read_bytes(file, start, as_bytes(dense))
        out[...] = dense


def _read_bytes(file: int, start: int, into: memoryview) -> None:
    while into:
        count = os.preadv(file, [into[:PIECE]], start)
        if count == 0:
            raise OSError(f"ends at byte {start}, {len(into)} bytes too early")
        start, into = start + count, into[count:]
