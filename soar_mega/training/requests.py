"""What a person asks of a running job by touching a file in its run folder.

``save-now``: save a checkpoint. ``stop-now``: save one and end. Rank 0 looks between steps; all
ranks hear of it in one small reduction, which also tells them whether any of them has failed at
something it did in the background, or was asked by a signal to end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh

SAVE_NOW, STOP_NOW = "save-now", "stop-now"


@dataclass(frozen=True)
class Agreed:
    """The same on every rank.

    Attributes:
        save, stop: The file is there.
        failed: Some rank said so of itself.
        leave: A signal asked some rank to save and end.
    """

    save: bool
    stop: bool
    failed: bool
    leave: bool = False


class Requests:
    """The files of one run.

    Args:
        folder: The run's; only rank 0 needs to see it.
        mesh: This process among all.
    """

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self._folder, self._mesh = folder, mesh
        self._stuck: set[str] = set()  # files that could not be removed

    def agree(self, *, failed: bool = False, leave: bool = False) -> Agreed:
        """What is asked for now; every rank calls it between the same two steps.

        Args:
            failed: Whether this rank has to tell of a failure.
            leave: Whether a signal asked this rank to end.

        Raises:
            PeerError: Another rank died, hangs or does not answer in time.
        """
        # os.path.exists: a file system that does not answer is no reason to leave the others
        # waiting in the reduction.
        asked = [
            self._mesh.rank == 0 and name not in self._stuck and os.path.exists(self._folder / name)
            for name in (SAVE_NOW, STOP_NOW)
        ]
        flags = torch.tensor([*asked, failed, leave], dtype=torch.int32, device=self._mesh.device)
        if self._mesh.world_group is not None:
            with waiting_for("every other process, to agree on what was asked for"):
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._mesh.world_group)
        return Agreed(*map(bool, flags.tolist()))

    def answered(self, agreed: Agreed) -> list[str]:
        """Remove the files of what was done, on rank 0.

        Returns:
            What could not be removed, in words. It is not looked at again by this process.
        """
        if self._mesh.rank != 0:
            return []
        problems = []
        for name, asked in ((SAVE_NOW, agreed.save), (STOP_NOW, agreed.stop)):
            try:
                if asked:
                    (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                self._stuck.add(name)
                problems.append(f"remove {self._folder / name} yourself: {error}")
        return problems
