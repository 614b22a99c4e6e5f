"""Checkpoints read and written by one process, piece by piece; for converters.

Apart from ``store``, as torch takes longer to import than a small model to convert.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.hashing import HashAlgorithm, hash_file
from soar_mega.checkpoint.manifest import TRAINER, check, write_manifest
from soar_mega.checkpoint.raw_tensors import Array, Plan, read_ahead
from soar_mega.checkpoint.state_files import (
    INDEX,
    DataFile,
    StoredBox,
    StoredTensor,
    read_index,
    read_region,
    write_index,
)
from soar_mega.checkpoint.synced import sync_folder, write_json

# What names of tensors begin with: see ``store``.
MODEL = "model."
EMA = "ema."


def read_extra(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint's ``trainer.json``.

    Raises:
        CheckpointError: It is missing or no JSON object.
    """
    file = Path(path) / TRAINER
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not an object")
    return content


class StateReader:
    """Tensors of a checkpoint, or regions of them, without a process group; for converters.

    Attributes:
        shapes, dtypes: Of each tensor; dtypes as safetensors codes.

    Raises:
        CheckpointError: The checkpoint is incomplete.
    """

    def __init__(self, path: Path | str) -> None:
        check(Path(path))
        self._state = Path(path) / "state"
        self._tensors = read_index(self._state / INDEX)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Array:
        """A global tensor or a region of it (slices with start and stop), as stored.

        Raises:
            OSError: A file is missing or too short.
        """
        return read_region(self._state, self._tensors[name], region)


def write(
    path: Path | str,
    plan: Plan,
    parts: Iterable[Array],
    extra: Mapping[str, Any],
    algorithm: HashAlgorithm = "xxh3-128",
) -> None:
    """Write and commit a checkpoint from one process, without holding it in memory.

    Args:
        path: Its folder, which must not exist.
        plan: Of all tensors, by name.
        parts: The elements of all tensors, row-major, one tensor after the other, in pieces of any
            size; a piece belongs to one tensor.
        extra: For ``trainer.json``.
        algorithm: Of the hashes in the manifest.

    Raises:
        OSError: The disk is full, or another reason. Nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    name = "rank-00000.safetensors"
    if temporary.exists():  # of a call that was killed
        shutil.rmtree(temporary)
    try:
        (temporary / "state").mkdir(parents=True)
        file = DataFile(temporary / "state" / name, plan, algorithm, direct=True)
        try:
            for part in read_ahead(parts):
                file.write(part)
            files = {f"state/{name}": file.close()}
        finally:
            file.abandon()
        boxes = {
            key: StoredTensor(
                shape, dtype, (StoredBox((0,) * len(shape), shape, name, file.starts[key]),)
            )
            for key, (shape, dtype) in plan.items()
        }
        write_index(temporary / "state" / INDEX, boxes)
        write_json(temporary / TRAINER, extra)
        for small in (TRAINER, f"state/{INDEX}"):
            place = temporary / small
            files[small] = place.stat().st_size, hash_file(place, algorithm)
        sync_folder(temporary / "state")
        write_manifest(temporary, int(extra.get("step", 0)), files, algorithm)
        sync_folder(temporary)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary)
