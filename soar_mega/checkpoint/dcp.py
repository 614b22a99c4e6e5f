"""What connects ``BoxedTensor`` and the state files with torch's distributed checkpoint (DCP).

DCP plans who writes and reads which boxes. Its own planners look pieces up only in tensors
(``utils.find_state_dict_object``) and the loading one empties what it does not know
(``planner_helpers._init_state_dict``); both offer methods to override. Its own storage keeps the
table of boxes as a pickle and each box as a ``torch.save`` archive; the storage here writes the
files of ``state_files`` instead, so nothing on the way in or out is pickled.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    Metadata,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.raw_tensors import read_box
from soar_mega.checkpoint.state_files import (
    INDEX,
    DataFile,
    StoredBox,
    StoredTensor,
    read_index,
    write_index,
)
from soar_mega.checkpoint.torch_arrays import DTYPES, as_array, code_of

# torch warns that one process saves or loads alone; that is what is meant here. Not around the
# calls: the list of filters is the whole process's, and saves run in a thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class BoxSavePlanner(DefaultSavePlanner):
    """Saves a flat ``name -> BoxedTensor`` mapping."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _shard(self.state_dict, index)


class BoxLoadPlanner(DefaultLoadPlanner):
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


class Writer(StorageWriter):
    """Writes this rank's boxes into one file, and on the coordinator the index.

    Args:
        folder: ``state/``, which exists.
        rank: Of this process.
        algorithm: Of the hashes.

    Attributes:
        hashes: File name -> (bytes, hash) of what this process wrote.
        written: Bytes written so far, also after an error.
    """

    def __init__(self, folder: Path, rank: int, algorithm: str) -> None:
        self._folder, self._rank, self._algorithm = folder, rank, algorithm
        self.hashes: dict[str, tuple[int, str]] = {}
        self.written = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """The folder is there already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Unchanged."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's boxes.

        Raises:
            OSError: The disk is full, or whatever else.
        """
        results: list[WriteResult] = []
        if plan.items:
            results = self._write(plan.items, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        name = f"rank-{self._rank:05d}.safetensors"
        boxes = {_key(item.index): _box_of(item) for item in items}
        file = DataFile(self._folder / name, boxes, self._algorithm)
        results = []
        try:
            for item in items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                file.write(as_array(tensor.cpu()))
                start = file.starts[_key(item.index)]
                results.append(WriteResult(item.index, tensor.nbytes, (name, start)))
            self.hashes[name] = file.close()
        finally:
            self.written = file.written
            file.abandon()
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on the coordinator."""
        places = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            boxes = []
            for chunk in entry.chunks:
                file, start = places[MetadataIndex(name, chunk.offsets)]
                boxes.append(StoredBox(tuple(chunk.offsets), tuple(chunk.sizes), file, start))
            dtype = code_of(entry.properties.dtype)
            tensors[name] = StoredTensor(tuple(entry.size), dtype, tuple(boxes))
        write_index(self._folder / INDEX, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True


def _key(index: MetadataIndex) -> str:
    """Of a box in a data file: the tensor's name and the box's corner."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _box_of(item: WriteItem) -> tuple[tuple[int, ...], str]:
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.sizes), code_of(item.tensor_data.properties.dtype)


class Reader(StorageReader):
    """Reads boxes of one checkpoint.

    Args:
        folder: ``state/``.

    Attributes:
        tensors: What the index says.

    Raises:
        CheckpointError: The index is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = read_index(folder / INDEX)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index in DCP's words."""
        metadata, places = {}, {}
        for name, tensor in self.tensors.items():
            chunks = []
            for box in tensor.boxes:
                offset = torch.Size(box.offset)
                chunks.append(ChunkStorageMetadata(offset, torch.Size(box.shape)))
                places[MetadataIndex(name, offset)] = box
            metadata[name] = TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[tensor.dtype]), torch.Size(tensor.shape), chunks
            )
        return Metadata(state_dict_metadata=dict(metadata), storage_data=places)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any
    ) -> None:
        """Keep where boxes lie."""
        self._places: dict[MetadataIndex, StoredBox] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the plan's targets, each file opened once.

        Raises:
            CheckpointError: A file is missing or too short.
        """
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            items.setdefault(self._places[item.storage_index].file, []).append(item)
        for name, wanted in items.items():
            try:
                with (self.folder / name).open("rb", buffering=0) as file:
                    self._read(file.fileno(), wanted, planner)
            except OSError as error:
                raise CheckpointError(f"{self.folder / name}: {error}") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, file: int, items: Iterable[ReadItem], planner: LoadPlanner) -> None:
        for item in sorted(items, key=lambda item: self._places[item.storage_index].start):
            box, name = self._places[item.storage_index], item.storage_index.fqn
            region = tuple(
                slice(first, first + size)
                for first, size in zip(item.storage_offsets, item.lengths, strict=True)
            )
            target = planner.resolve_tensor(item).detach()
            stored = DTYPES[self.tensors[name].dtype]
            direct = target.dtype == stored and target.device.type == "cpu"
            piece = target if direct else torch.empty(target.shape, dtype=stored)
            read_box(file, box.start, box.shape, region, as_array(piece))
            if not direct:
                target.copy_(piece)
            planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True


def bytes_of(tensors: Iterable[BoxedTensor]) -> int:
    """Bytes that this process writes of them."""
    return sum(
        math.prod(box.shape) * box.data.element_size()
        for tensor in tensors
        if tensor.contribute
        for box in tensor.boxes
    )
