"""Saving the checkpoints of one run, in the background or not.

A save in the background copies the state to host memory and writes it from a thread, which talks to
the other ranks through a process group of its own: a group's calls must come in the same order on
all ranks, and those of two threads do not. One save at a time: the next one waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from soar_mega.checkpoint import store
from soar_mega.checkpoint.agree import gather
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError, DiskFullError, is_disk_full
from soar_mega.checkpoint.hashing import HashAlgorithm
from soar_mega.checkpoint.retention import Retention
from soar_mega.checkpoint.staging import Stage
from soar_mega.parallel.mesh import Mesh


class Checkpointer:
    """Writes checkpoints; every rank makes one, and calls it at the same steps.

    Args:
        root: Folder of the run's checkpoints.
        mesh: This process among all.
        retention: Which checkpoints stay.
        algorithm: Of the hashes.
        background: Whether ``save`` returns before the files are written.
    """

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        retention: Retention | None = None,
        algorithm: HashAlgorithm = "xxh3-128",
        background: bool = True,
    ) -> None:
        self.root = root
        self._retention, self._algorithm, self._background = retention, algorithm, background
        group = None
        if mesh.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=mesh.timeout)
        self._peers = replace(mesh, world_group=group, device=torch.device("cpu"))
        self._stage = Stage()
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._saved: list[store.Saved] = []

    def save(self, step: int, tensors: Mapping[str, BoxedTensor], extra: Mapping[str, Any]) -> None:
        """Begin to save the state as it is now; see ``store.save``.

        Raises:
            CheckpointError: On every rank: the save before failed, or this one if not in the
                background.
        """
        self.settle()
        if not self._background:
            self._write(step, tensors, extra)
            self.settle()
            return
        self._thread = Thread(
            target=self._write,
            args=(step, self._stage.copy(tensors), dict(extra)),
            name=f"save-{step}",
        )
        self._thread.start()

    def _write(
        self, step: int, tensors: Mapping[str, BoxedTensor], extra: Mapping[str, Any]
    ) -> None:
        try:
            saved = store.save(
                self.root, step, tensors, extra, self._peers, self._retention, self._algorithm
            )
            self._saved.append(saved)  # looked up only now: ``finished`` swaps the list meanwhile
        except BaseException as error:  # of a thread, which has nobody else to tell
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether a save failed here that ``settle`` was not called after; ask after each step."""
        return self._error is not None

    def finished(self) -> list[store.Saved]:
        """Checkpoints committed since the last call."""
        saved, self._saved = self._saved, []
        return saved

    def settle(self) -> None:
        """Wait for the save under way; every rank calls it.

        Raises:
            CheckpointError: On every rank, if it failed on any.
        """
        self.join()
        error, self._error = self._error, None
        if error is not None and not isinstance(error, Exception):
            raise error
        told = None if error is None else (str(error), is_disk_full(error))
        for answer in gather(told, self._peers):
            if answer is not None:
                message, full = answer
                raise (DiskFullError if full else CheckpointError)(message) from error

    def join(self) -> None:
        """Wait for the save under way, without the others; for the way out after an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
