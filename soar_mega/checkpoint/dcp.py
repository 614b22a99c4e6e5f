"""The planners and the reader that connect ``BoxedTensor`` with torch's distributed checkpoint.

torch's default planners look pieces up only in tensors (``utils.find_state_dict_object``) and the
loading one empties what it does not know (``planner_helpers._init_state_dict``); both offer methods
to override. The reader replaces the free unpickling of ``.metadata`` by one that admits the plain
records of the format and nothing callable of a stranger; chunk data is read by torch with
``weights_only=True`` already.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    Metadata,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError

_ADMITTED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
_DTYPES = {"float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"}


class SavePlanner(DefaultSavePlanner):
    """Saves a flat ``name -> BoxedTensor`` mapping."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _shard(self.state_dict, index)


class LoadPlanner(DefaultLoadPlanner):
    """Loads into a flat ``name -> BoxedTensor`` mapping, in place."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _shard(self.state_dict, index)


def _shard(tensors: dict[str, BoxedTensor], index: MetadataIndex) -> Tensor:
    return tensors[index.fqn].__get_tensor_shard__(index)


class Reader(FileSystemReader):
    """Reads the files of one checkpoint; keeps the metadata, so that many reads parse it once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of tensors and chunks.

        Raises:
            CheckpointError: The file is missing, damaged, or holds more than plain records.
        """
        if self._metadata is None:
            path = Path(self.path) / ".metadata"
            try:
                with path.open("rb") as file:
                    metadata = _Unpickler(file).load()
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
            except Exception as error:
                raise CheckpointError(f"{path} cannot be read: {error!r}") from error
            if not isinstance(metadata, Metadata):
                raise CheckpointError(f"{path} holds a {type(metadata).__name__}, not Metadata")
            self._metadata = metadata
        return self._metadata

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (global shape, dtype) of every stored tensor; errors as ``read_metadata``."""
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in self.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ADMITTED.get(module, ()) or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise CheckpointError(
            f"refers to {module}.{name}, which is no part of the checkpoint format; not loaded"
        )
