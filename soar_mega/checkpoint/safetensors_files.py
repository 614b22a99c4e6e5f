"""Safetensors folders as diffusers lays them out: lazy reading, and writing tensor by tensor.

A folder holds ``diffusion_pytorch_model.safetensors``, or numbered shards and an index. The writer
knows every name, shape and dtype in advance, so it writes each file's header first and then appends
tensors; memory never holds more than one.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from safetensors import safe_open

from soar_mega.checkpoint.direct_file import create
from soar_mega.checkpoint.errors import CheckpointError
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

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
# What diffusers' save_pretrained uses.
MAX_SHARD_BYTES = 10 * 10**9


class SafetensorsFolder:
    """The tensors of one folder, or of one file, read on demand by plain reads.

    Args:
        place: A folder as diffusers lays it out, or a safetensors file.

    Attributes:
        shapes, dtypes: Of each tensor; dtypes as safetensors codes.

    Raises:
        CheckpointError: No weights there, or a file that the index names is missing or unreadable.
    """

    def __init__(self, place: Path) -> None:
        self.folder = place
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in [place] if place.is_file() else self._files():
            try:
                with safe_open(path, framework="np"):  # checks the whole header
                    pass
                self._read_header(path)
            except Exception as error:
                raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error

    def _read_header(self, path: Path) -> None:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        for key, entry in entries.items():
            if key == "__metadata__":
                continue
            if entry["dtype"] not in STORAGE:
                raise CheckpointError(f"{key} is of dtype {entry['dtype']}, which is not supported")
            self.shapes[key], self.dtypes[key] = tuple(entry["shape"]), entry["dtype"]
            self._places[key] = path, 8 + length + entry["data_offsets"][0]

    def _files(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            try:
                index = json.loads((self.folder / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{self.folder / INDEX} is damaged: {error}") from error
            files = [self.folder / name for name in sorted(set(index.values()))]
            missing = [str(path) for path in files if not path.is_file()]
            if missing:
                raise CheckpointError(f"{self.folder / INDEX} names missing files: {missing}")
            return files
        single = self.folder / f"{STEM}.safetensors"
        if not single.is_file():
            hint = ""
            if any(self.folder.glob("*.bin")):
                hint = (
                    "; its .bin files are pickles, which are not loaded: save the model again with "
                    "safe_serialization=True"
                )
            raise CheckpointError(f"{self.folder} has neither {single.name} nor {INDEX}{hint}")
        return [single]

    def read(self, key: str, region: tuple[slice, ...] | None = None) -> Array:
        """One tensor, or a region of it (slices with start and stop)."""
        shape = self.shapes[key]
        path, start = self._places[key]
        cut = region or tuple(slice(0, size) for size in shape)
        out = np.empty([one.stop - one.start for one in cut], STORAGE[self.dtypes[key]])
        with path.open("rb", buffering=0) as file:
            read_box(file.fileno(), start, shape, cut, out)
        return out


class StreamWriter:
    """Writes one safetensors folder or file, synced; tensors come in the order of ``plan``.

    Args:
        place: The folder, or with ``single`` the file.
        plan: Of its tensors.
        max_shard_bytes: A new file begins before this is passed; None: one file.
        single: Whether ``place`` is the file itself.
    """

    def __init__(
        self,
        place: Path,
        plan: Plan,
        max_shard_bytes: int | None = MAX_SHARD_BYTES,
        *,
        single: bool = False,
    ) -> None:
        self.place, self.plan, self._single = place, plan, single
        limit = math.inf if single or max_shard_bytes is None else max_shard_bytes
        self._shards: list[list[str]] = [[]]
        filled = self.total_bytes = 0
        for key in plan:
            size = byte_count(*plan[key])
            if self._shards[-1] and filled + size > limit:
                self._shards.append([])
                filled = 0
            self._shards[-1].append(key)
            filled += size
            self.total_bytes += size
        self._pending = [(number, key) for number, keys in enumerate(self._shards) for key in keys]
        self._pending.reverse()
        self._left = 0  # elements of the tensor that is being written
        self._file: BinaryIO | None = None
        self._open_number: int | None = None

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return (
            f"{STEM}.safetensors"
            if count == 1
            else f"{STEM}-{number + 1:05d}-of-{count:05d}.safetensors"
        )

    def write(self, key: str, piece: Array) -> None:
        """Append a tensor of the plan, or its next elements, row-major.

        Raises:
            ValueError: It is not the plan's turn of this tensor, or it does not fit.
        """
        number, expected = self._pending[-1] if self._pending else (0, "nothing")
        shape, dtype = self.plan[key]
        if self._left == 0:
            self._left = math.prod(shape)
        if key != expected or piece.dtype != STORAGE[dtype] or piece.size > self._left:
            raise ValueError(f"expected {expected}, got {piece.size} of {key} {piece.dtype}")
        if number != self._open_number:
            self._begin(number)
        assert self._file is not None
        write_all(self._file, as_bytes(np.ascontiguousarray(piece)))
        self._left -= piece.size
        if self._left == 0:
            self._pending.pop()

    def _begin(self, number: int) -> None:
        self._close()
        keys = self._shards[number]
        head, _ = header({key: self.plan[key] for key in keys})
        path = self.place if self._single else self.place / self._name(number)
        self._file = create(path, len(head) + sum(byte_count(*self.plan[key]) for key in keys))
        write_all(self._file, head)
        self._open_number = number

    def _close(self) -> None:
        if self._file is not None:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file = None

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            if self._file is not None:
                self._file.close()
            return
        self._close()
        if self._pending:
            raise ValueError(f"{len(self._pending)} planned tensors were not written")
        if len(self._shards) > 1:
            where = {k: self._name(n) for n, keys in enumerate(self._shards) for k in keys}
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": dict(sorted(where.items())),
            }
            write_text(self.place / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
