"""Checkpoints of a run: save, commit, load into any layout.

Layout: ``<root>/step-00000003/{state/, trainer.json, manifest.json}``. ``state/`` holds the sharded
tensors (``state_files``), planned by torch's distributed checkpoint; ``trainer.json`` everything
else. A checkpoint is written as ``step-00000003.tmp``; the manifest is written last, and the folder
renamed: that is the commit. Rank 0 decides whatever has to be decided and tells the others, so that
all ranks go on from the same place or fail with the same words.

Names of tensors begin with MODEL (fp32 master weights, and stored buffers), EMA, or what else the
trainer chooses (optimizer moments); behind MODEL and EMA comes the parameter's name. Converters
read these keys of ``trainer.json``: ``model.pretrained`` (the diffusers folder the run started
with), ``model.transformer`` (the transformer config in diffusers' words), optionally
``model.max_sequence_length`` (T5 tokens it was trained with) and ``lineage`` (facts for the model
card, plain values).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp

from soar_mega.checkpoint.agree import gather, on_rank_0
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.dcp import BoxLoadPlanner, BoxSavePlanner, Reader, Writer, bytes_of
from soar_mega.checkpoint.errors import CheckpointError, DiskFullError, is_disk_full, listing
from soar_mega.checkpoint.folders import (
    clear_interrupted,
    committed,
    find,
    folder_of,
    latest,
    replace,
    set_aside_after,
)
from soar_mega.checkpoint.hashing import HashAlgorithm, hash_file
from soar_mega.checkpoint.manifest import TRAINER, check, identity, verify, write_manifest
from soar_mega.checkpoint.offline import EMA, MODEL, StateReader, read_extra
from soar_mega.checkpoint.retention import Retention, retain
from soar_mega.checkpoint.state_files import INDEX
from soar_mega.checkpoint.synced import sync_folder, write_json
from soar_mega.parallel.mesh import Mesh

__all__ = [
    "EMA",
    "MODEL",
    "Saved",
    "StateReader",
    "check",
    "committed",
    "find",
    "identity",
    "latest",
    "load",
    "read_extra",
    "save",
    "set_aside_after",
    "verify",
]

_SMALL_FILES = 2**20  # what trainer.json, index and manifest are allowed for, in bytes


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint.

    Attributes:
        path: Its folder.
        seconds: It took to write.
        problems: Old checkpoints that could not be deleted, and why; the same on every rank.
    """

    path: Path
    seconds: float
    problems: list[str]


def save(
    root: Path | str,
    step: int,
    tensors: Mapping[str, BoxedTensor],
    extra: Mapping[str, Any],
    mesh: Mesh,
    retention: Retention | None = None,
    algorithm: HashAlgorithm = "xxh3-128",
) -> Saved:
    """Write and commit one checkpoint; every rank calls it.

    Args:
        root: Folder of the run's checkpoints.
        step: Training steps done. An older checkpoint of the same step is replaced.
        tensors: Name -> this rank's pieces; over all ranks they cover each tensor exactly once.
        extra: JSON-able rest, written by rank 0 as ``trainer.json``.
        mesh: This process among all.
        retention: Which checkpoints stay; None keeps all.
        algorithm: Of the hashes in the manifest.

    Raises:
        CheckpointError: On every rank, if any rank failed; nothing is committed then, what was
            there is untouched, and what was written is removed. A DiskFullError says how many
            bytes are missing.
    """
    root, began = Path(root), time.perf_counter()
    final = folder_of(root, step)
    temporary = final.with_name(final.name + ".tmp")
    needed = sum(gather(bytes_of(tensors.values()), mesh))
    writer = Writer(temporary / "state", mesh.rank, algorithm)

    def prepare() -> None:
        clear_interrupted(root)
        (temporary / "state").mkdir(parents=True)
        _refuse_full_disk(root, step, needed)
        write_json(temporary / TRAINER, extra)

    def commit() -> list[str]:
        small = {name: temporary / name for name in (TRAINER, f"state/{INDEX}")}
        for name, path in small.items():
            files[name] = path.stat().st_size, hash_file(path, algorithm)
        sync_folder(temporary / "state")
        write_manifest(temporary, step, files, algorithm)
        sync_folder(temporary)
        replace(temporary, final)
        return [] if retention is None else retain(root, retention)

    try:
        _refuse_not_finite(tensors, mesh)
        on_rank_0(mesh, prepare, f"cannot write the checkpoint {temporary}")
        with _as_checkpoint_error(f"cannot write {temporary}"):
            torch_dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=BoxSavePlanner(),
                process_group=mesh.world_group,
                no_dist=mesh.world_group is None,
            )
        files = {
            f"state/{name}": entry
            for hashes in gather(writer.hashes, mesh)
            for name, entry in hashes.items()
        }
        problems = on_rank_0(mesh, commit, f"cannot commit the checkpoint {final}")
        return Saved(final, time.perf_counter() - began, problems)
    except DiskFullError as error:
        written = sum(gather(writer.written, mesh))
        raise DiskFullError(
            f"{error}\nThe checkpoint of step {step} needs {needed:,} bytes, of which {written:,} "
            f"could be written: at least {max(needed - written, 1):,} bytes are missing. Older "
            "checkpoints are untouched: free space, or lower checkpoint.checkpoints_total_limit"
            if written
            else str(error)
        ) from error
    finally:
        if mesh.rank == 0 and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_full_disk(root: Path, step: int, needed: int) -> None:
    """A look before the first byte. A quota shows up in no such look, only in the writing."""
    free = shutil.disk_usage(root).free
    if free < needed + _SMALL_FILES:
        raise DiskFullError(
            f"the checkpoint of step {step} needs {needed:,} bytes and {free:,} are free: "
            f"{needed + _SMALL_FILES - free:,} bytes are missing. Older checkpoints are untouched: "
            "free space, or lower checkpoint.checkpoints_total_limit"
        )


def _refuse_not_finite(tensors: Mapping[str, BoxedTensor], mesh: Mesh) -> None:
    """A state with a NaN in it would be resumed from for ever.

    Raises:
        CheckpointError: On every rank, naming the tensors.
    """
    sick = []
    for name, tensor in tensors.items():
        for box in tensor.boxes if tensor.contribute else ():
            if box.data.numel() and not torch.isfinite(torch.stack(torch.aminmax(box.data))).all():
                sick.append(name)
                break
    everyone = sorted({name for names in gather(sick, mesh) for name in names})
    if everyone:
        raise CheckpointError(
            "the training state is not saved, because it is not finite any more:"
            + listing("tensors with NaN or infinity", everyone)
        )


def load(path: Path | str, tensors: Mapping[str, BoxedTensor], mesh: Mesh) -> dict[str, Any]:
    """Read this rank's pieces in place, whatever layout wrote them; all ranks call it.

    The hashes are not compared here: ``selection`` does before.

    Args:
        path: A verified checkpoint.
        tensors: Name -> pieces to fill; the checkpoint may hold more tensors than these.
        mesh: This process among all.

    Returns:
        The content of ``trainer.json``.

    Raises:
        CheckpointError: On every rank: files that cannot be read, tensors missing or of another
            shape (all are listed).
    """
    path = Path(path)
    problem, reader, extra = "", None, {}
    try:
        reader, extra = Reader(path / "state"), read_extra(path)
        problem = _compare(reader, tensors)
    except CheckpointError as error:
        problem = str(error)
    everyone = gather(problem, mesh)
    if any(everyone):
        raise CheckpointError(
            f"the checkpoint {path} cannot be loaded: {next(p for p in everyone if p)}"
        )
    with _as_checkpoint_error(f"cannot load the checkpoint {path}"):
        torch_dcp.load(
            dict(tensors),
            storage_reader=reader,
            planner=BoxLoadPlanner(),
            process_group=mesh.world_group,
            no_dist=mesh.world_group is None,
        )
    return extra


def _compare(reader: Reader, tensors: Mapping[str, BoxedTensor]) -> str:
    stored = reader.tensors
    missing = [name for name in tensors if name not in stored]
    wrong = [
        f"{name}: {stored[name].shape} stored, {tensor.global_shape} wanted"
        for name, tensor in tensors.items()
        if name in stored and stored[name].shape != tensor.global_shape
    ]
    return listing("missing tensors", missing) + listing("wrong shapes", wrong)


@contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """torch raises a CheckpointException (a BaseException) on every rank if one of them failed."""
    try:
        yield
    except torch_dcp.CheckpointException as error:
        reasons = {rank: info[0] for rank, info in error.failures.items()}
        kind = DiskFullError if any(map(is_disk_full, reasons.values())) else CheckpointError
        told = {f"rank {rank}: {reason!r}" for rank, reason in reasons.items()}
        raise kind(what + listing("reasons", told)) from error
