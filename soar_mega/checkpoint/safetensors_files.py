"""Safetensors folders as diffusers lays them out: lazy reading, and writing tensor by tensor.

A folder holds ``diffusion_pytorch_model.safetensors``, or numbered shards and an index. The writer
knows every name, shape and dtype in advance, so it writes each file's header first and then appends
tensors; memory never holds more than one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from soar_mega.checkpoint.errors import CheckpointError, listing

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
# What diffusers' save_pretrained uses.
MAX_SHARD_BYTES = 10 * 10**9

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


class SafetensorsFolder:
    """The tensors of one folder, read on demand.

    Raises:
        CheckpointError: No weights there, or a file that the index names is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for path in self._files():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        self._file_of[key] = path
                        self.shapes[key] = tuple(file.get_slice(key).get_shape())
            except Exception as error:
                raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error

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

    def read(self, key: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor, or a slice of it; the mapped file is let go at once."""
        with safe_open(self._file_of[key], framework="pt") as file:
            if region is None:
                tensor: Tensor = file.get_tensor(key)
            else:
                tensor = file.get_slice(key)[region]
            return tensor.clone()


class StreamWriter:
    """Writes one safetensors folder; tensors come in the order of ``plan``.

    Args:
        folder: Where the files go.
        plan: Key -> (shape, dtype), in writing order.
        max_shard_bytes: A new file begins before this is passed.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, tuple[tuple[int, ...], torch.dtype]],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.folder, self.plan = folder, plan
        self._shards: list[list[str]] = [[]]
        filled = self.total_bytes = 0
        for key in plan:
            size = self._size(key)
            if self._shards[-1] and filled + size > max_shard_bytes:
                self._shards.append([])
                filled = 0
            self._shards[-1].append(key)
            filled += size
            self.total_bytes += size
        self._pending = [(number, key) for number, keys in enumerate(self._shards) for key in keys]
        self._pending.reverse()
        self._file: BinaryIO | None = None
        self._open_number: int | None = None

    def _size(self, key: str) -> int:
        shape, dtype = self.plan[key]
        return math.prod(shape) * dtype.itemsize

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return (
            f"{STEM}.safetensors"
            if count == 1
            else f"{STEM}-{number + 1:05d}-of-{count:05d}.safetensors"
        )

    def write(self, key: str, tensor: Tensor) -> None:
        """Append the next tensor of the plan."""
        number, expected = self._pending.pop()
        shape, dtype = self.plan[key]
        if key != expected or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"expected {expected} {self.plan[expected]}, got {key} {tensor.shape}")
        if number != self._open_number:
            self._begin(number)
        assert self._file is not None
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._file.write(raw.numpy().data)

    def _begin(self, number: int) -> None:
        self._close()
        head, _ = header({key: self.plan[key] for key in self._shards[number]})
        self._file = (self.folder / self._name(number)).open("wb")
        self._file.write(head)
        self._open_number = number

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        if error is not None:
            return
        if self._pending:
            raise ValueError(f"{len(self._pending)} planned tensors were not written")
        if len(self._shards) > 1:
            where = {k: self._name(n) for n, keys in enumerate(self._shards) for k in keys}
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": dict(sorted(where.items())),
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
