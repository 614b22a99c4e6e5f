"""Checkpoints of a run: save, commit, find, load into any layout, retain.

Layout: ``<root>/step-00000003/{state/, trainer.json, manifest.json}``. ``state/`` is torch's
distributed checkpoint (sharded tensors), ``trainer.json`` everything else. A checkpoint is written
as ``step-00000003.tmp``; ``manifest.json`` (size and SHA-256 of every file) is written last, and
the folder renamed: that is the commit. Rank 0 decides whatever has to be decided and tells the
others, so that all ranks resume from the same place or fail with the same words.

Names of tensors begin with MODEL (fp32 master weights, and stored buffers), EMA, or what else the
trainer chooses (optimizer moments); behind MODEL and EMA comes the parameter's name. Converters
read these keys of ``trainer.json``: ``model.pretrained`` (the diffusers folder the run started
with), ``model.transformer`` (the transformer config in diffusers' words), optionally
``model.max_sequence_length`` (T5 tokens it was trained with) and ``lineage`` (facts for the model
card, plain values).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor

from soar_mega.checkpoint.agree import gather, on_rank_0
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.dcp import LoadPlanner, Reader, SavePlanner
from soar_mega.checkpoint.errors import CheckpointError, listing
from soar_mega.checkpoint.folders import (
    check,
    committed,
    find,
    latest,
    replace,
    resolve,
    retain,
    set_aside_after,
    write_json,
)
from soar_mega.parallel.mesh import Mesh

__all__ = [
    "EMA",
    "MODEL",
    "StateReader",
    "check",
    "committed",
    "find",
    "latest",
    "load",
    "read_extra",
    "resolve",
    "save",
    "set_aside_after",
]

MODEL = "model."
EMA = "ema."


def save(
    root: Path | str,
    step: int,
    tensors: Mapping[str, BoxedTensor],
    extra: Mapping[str, Any],
    mesh: Mesh,
    keep: int | None = None,
) -> Path:
    """Write and commit one checkpoint; every rank calls it.

    Args:
        root: Folder of the run's checkpoints.
        step: Training steps done. An older checkpoint of the same step is replaced.
        tensors: Name -> this rank's pieces; over all ranks they cover each tensor exactly once.
        extra: JSON-able rest, written by rank 0 as ``trainer.json``.
        mesh: This process among all.
        keep: Number of newest checkpoints to keep; None keeps all.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: On every rank, if any rank failed; nothing is committed then.
    """
    final = Path(root) / f"step-{step:08d}"
    temporary = final.with_name(final.name + ".tmp")

    def prepare() -> None:
        if temporary.exists():
            shutil.rmtree(temporary)
        (temporary / "state").mkdir(parents=True)
        write_json(temporary / "trainer.json", dict(extra))

    on_rank_0(mesh, prepare, f"cannot write the checkpoint {temporary}")
    with _quiet_when_alone(mesh), _as_checkpoint_error(f"cannot write {temporary}"):
        torch_dcp.save(
            dict(tensors),
            storage_writer=torch_dcp.FileSystemWriter(temporary / "state"),
            planner=SavePlanner(),
            process_group=mesh.world_group,
            no_dist=mesh.world_group is None,
        )
    digests = _digest_files(temporary, mesh)

    def commit() -> None:
        write_json(temporary / "manifest.json", {"step": step, "files": digests()})
        replace(temporary, final)
        if keep is not None:
            retain(Path(root), keep)

    on_rank_0(mesh, commit, f"cannot commit the checkpoint {final}")
    return final


def load(path: Path | str, tensors: Mapping[str, BoxedTensor], mesh: Mesh) -> dict[str, Any]:
    """Verify, then read this rank's pieces in place, whatever layout wrote them; all ranks call it.

    Args:
        path: A committed checkpoint.
        tensors: Name -> pieces to fill; the checkpoint may hold more tensors than these.
        mesh: This process among all.

    Returns:
        The content of ``trainer.json``.

    Raises:
        CheckpointError: On every rank: not committed, files missing, of the wrong size or with
            another hash, tensors missing or of another shape (all are listed).
    """
    path = Path(path)
    on_rank_0(mesh, lambda: check(path), f"cannot load the checkpoint {path}")
    damage = [name for names in gather(_wrong_hashes(path, mesh), mesh) for name in names]
    if damage:
        raise CheckpointError(
            f"checkpoint {path} is damaged:" + listing("files with another hash", sorted(damage))
        )
    reader = Reader(path / "state")
    problem = _compare(reader, tensors)
    everyone = gather(problem, mesh)
    if any(everyone):
        raise CheckpointError(
            f"the checkpoint {path} does not fit this model: {next(p for p in everyone if p)}"
        )
    with _quiet_when_alone(mesh), _as_checkpoint_error(f"cannot load the checkpoint {path}"):
        torch_dcp.load(
            dict(tensors),
            storage_reader=reader,
            planner=LoadPlanner(),
            process_group=mesh.world_group,
            no_dist=mesh.world_group is None,
        )
    return read_extra(path)


def read_extra(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint's ``trainer.json``."""
    content: dict[str, Any] = json.loads((Path(path) / "trainer.json").read_text())
    return content


class StateReader:
    """Single tensors of a checkpoint, without a process group; for converters."""

    def __init__(self, path: Path | str) -> None:
        check(Path(path))
        self._reader = Reader(Path(path) / "state")
        table = self._reader.tensors()
        self.shapes = {name: shape for name, (shape, _) in table.items()}
        self.dtypes = {name: dtype for name, (_, dtype) in table.items()}

    def read(self, name: str) -> Tensor:
        """The whole global tensor, in its stored dtype, on the CPU."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            torch_dcp.load(
                {name: BoxedTensor.whole(tensor)},
                storage_reader=self._reader,
                planner=LoadPlanner(),
                no_dist=True,
            )
        return tensor


def _digest_files(folder: Path, mesh: Mesh) -> Callable[[], dict[str, dict[str, Any]]]:
    """Each rank hashes the data files it wrote (DCP names them by rank), rank 0 the rest."""
    mine = {}
    problem = None
    try:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            writer = re.match(r"__(\d+)_", file.name)
            if (int(writer[1]) if writer else 0) == mesh.rank:
                digest = _sha256(file)
                name = file.relative_to(folder).as_posix()
                mine[name] = {"size": file.stat().st_size, "sha256": digest}
    except OSError as error:
        problem = str(error)
    everyone = gather((mine, problem), mesh)

    def joined() -> dict[str, dict[str, Any]]:
        for _, failure in everyone:
            if failure:
                raise CheckpointError(failure)
        return {name: entry for files, _ in everyone for name, entry in sorted(files.items())}

    return joined


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _wrong_hashes(folder: Path, mesh: Mesh) -> list[str]:
    """Of every ``world_size``-th file of the manifest, those whose bytes have changed."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    mine = sorted(files)[mesh.rank :: mesh.world_size]
    wrong = []
    for name in mine:
        try:
            same = _sha256(folder / name) == files[name].get("sha256")
        except OSError:
            same = False
        if not same:
            wrong.append(name)
    return wrong


def _compare(reader: Reader, tensors: Mapping[str, BoxedTensor]) -> str:
    try:
        stored = reader.tensors()
    except CheckpointError as error:
        return str(error)
    missing = [name for name in tensors if name not in stored]
    wrong = [
        f"{name}: {stored[name][0]} stored, {tensor.global_shape} wanted"
        for name, tensor in tensors.items()
        if name in stored and stored[name][0] != tensor.global_shape
    ]
    return listing("missing tensors", missing) + listing("wrong shapes", wrong)


@contextmanager
def _quiet_when_alone(mesh: Mesh) -> Iterator[None]:
    """torch warns that it saves or loads in one process; that is what is meant here."""
    with warnings.catch_warnings():
        if mesh.world_group is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """torch raises a CheckpointException (a BaseException) on every rank if one of them failed."""
    try:
        yield
    except torch_dcp.CheckpointException as error:
        reasons = {f"rank {rank}: {info[0]!r}" for rank, info in error.failures.items()}
        raise CheckpointError(what + listing("reasons", reasons)) from error
