"""The bytes of a checkpoint's tensors: one safetensors file a rank, and an index of all boxes.

``state/rank-00003.safetensors`` holds the boxes (see ``boxes``) that rank 3 wrote, as plain bytes;
``state/index.json`` says for each global tensor its dtype, its shape and where its boxes lie.
Nothing of it is a pickle. Files are written and read by plain calls, not mapped: mapped pages count
as resident memory, and a mapped file that shrinks kills the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soar_mega.checkpoint.direct_file import create
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.hashing import new_hash
from soar_mega.checkpoint.raw_tensors import (
    STORAGE,
    Array,
    Plan,
    as_bytes,
    byte_count,
    header,
    read_box,
    write_all,
)
from soar_mega.checkpoint.synced import write_text

INDEX = "index.json"
FORMAT = 1
_HASHED = 2**18  # bytes that are hashed and then written while a processor has them in its cache


@dataclass(frozen=True)
class StoredBox:
    """Where one box of a tensor lies.

    Attributes:
        offset, shape: Of the box in the global tensor.
        file: Name under ``state/``.
        start: Its first byte in that file.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class StoredTensor:
    """One global tensor of a checkpoint; its boxes cover it. The dtype is a safetensors code."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[StoredBox, ...]


def write_index(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write ``index.json``."""
    content = {
        "format": FORMAT,
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "boxes": [[box.offset, box.shape, box.file, box.start] for box in tensor.boxes],
            }
            for name, tensor in sorted(tensors.items())
        },
    }
    write_text(path, json.dumps(content, separators=(",", ":")) + "\n")


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Read ``index.json``; what is in it decides which bytes are read, so all of it is checked.

    Raises:
        CheckpointError: Missing, damaged, of another format, or boxes that are none.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    try:
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is of format {content['format']!r}, this version reads format {FORMAT}"
            )
        return {str(name): _parse(entry) for name, entry in content["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _parse(entry: Any) -> StoredTensor:
    shape = tuple(_count(n) for n in entry["shape"])
    boxes = []
    for offset, size, file, start in entry["boxes"]:
        box = StoredBox(
            tuple(_count(n) for n in offset), tuple(_count(n) for n in size), file, _count(start)
        )
        inside = len(box.offset) == len(box.shape) == len(shape) and all(
            o + s <= n for o, s, n in zip(box.offset, box.shape, shape, strict=True)
        )
        if not inside or not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"no box of a tensor of shape {shape}: {offset}, {size}, {file!r}")
        boxes.append(box)
    if entry["dtype"] not in STORAGE:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    return StoredTensor(shape, entry["dtype"], tuple(boxes))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


class DataFile:
    """Writes one file of boxes, hashing what it writes; synced when closed.

    Args:
        path: The file.
        plan: Of its boxes.
        algorithm: Of the hash.
        direct: Past the page cache, if it gets large.

    Attributes:
        starts: Key -> first byte in the file.
        written: Bytes so far.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        algorithm: str,
        *,
        direct: bool = False,
    ) -> None:
        head, self.starts = header(plan)
        self._end = len(head) + sum(byte_count(*entry) for entry in plan.values())
        self._hash = new_hash(algorithm)
        self.written = 0
        self._file = create(path, self._end) if direct else path.open("wb", buffering=0)
        self._put(memoryview(head))

    def write(self, array: Array) -> None:
        """Append an array's elements, row-major; the caller keeps to the plan's order."""
        self._put(as_bytes(np.ascontiguousarray(array)))

    def _put(self, data: memoryview) -> None:
        for start in range(0, len(data), _HASHED):
            piece = data[start : start + _HASHED]
            self._hash.update(piece)
            self.written += write_all(self._file, piece)

    def close(self) -> tuple[int, str]:
        """Sync; returns the size in bytes and the hash.

        Raises:
            ValueError: Not everything of the plan was written.
        """
        with self._file:
            if self.written != self._end:
                raise ValueError(f"{self.written} of {self._end} planned bytes were written")
            self._file.flush()
            os.fsync(self._file.fileno())
        return self.written, self._hash.hexdigest()

    def abandon(self) -> None:
        """Close after an error."""
        self._file.close()


def overlap(
    box: StoredBox, region: tuple[slice, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What a box holds of a region: as slices of the box, and of the region; None: nothing."""
    inside, target = [], []
    for offset, size, cut in zip(box.offset, box.shape, region, strict=True):
        first, last = max(offset, cut.start), min(offset + size, cut.stop)
        if first >= last:
            return None
        inside.append(slice(first - offset, last - offset))
        target.append(slice(first - cut.start, last - cut.start))
    return tuple(inside), tuple(target)


def read_region(
    folder: Path, tensor: StoredTensor, region: tuple[slice, ...] | None = None
) -> Array:
    """A part of a global tensor, put together from the boxes that hold it.

    Args:
        folder: ``state/``.
        tensor: Its entry in the index.
        region: One slice with start and stop per dimension; None: everything.

    Raises:
        OSError: A file is missing or too short.
        CheckpointError: The boxes do not cover the region.
    """
    region = region or tuple(slice(0, size) for size in tensor.shape)
    out = np.empty([cut.stop - cut.start for cut in region], STORAGE[tensor.dtype])
    found = 0
    for box, inside, target in _boxes_in(tensor, region):
        part = out[target] if target else out  # a scalar's part would be a copy
        with (folder / box.file).open("rb", buffering=0) as file:
            read_box(file.fileno(), box.start, box.shape, inside, part)
        found += part.size
    if found != out.size:
        raise CheckpointError(f"{folder / INDEX}: boxes hold {found} of {out.size} elements")
    return out


def _boxes_in(
    tensor: StoredTensor, region: tuple[slice, ...]
) -> Iterator[tuple[StoredBox, tuple[slice, ...], tuple[slice, ...]]]:
    for box in tensor.boxes:
        both = overlap(box, region)
        if both is not None:
            yield box, *both
