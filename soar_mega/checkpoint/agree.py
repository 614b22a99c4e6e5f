"""Decisions that all ranks of a run take together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from soar_mega.checkpoint.errors import CheckpointError, DiskFullError, is_disk_full
from soar_mega.parallel.mesh import Mesh

T = TypeVar("T")


def on_rank_0(mesh: Mesh, function: Callable[[], T], what: str) -> T:
    """Run ``function`` on rank 0 and give every rank its (picklable) result.

    Raises:
        CheckpointError: On every rank, with ``what`` and the message, if it raised; a
            DiskFullError if that was the reason.
    """
    answer: list[Any] = [None, False, None]
    if mesh.rank == 0:
        try:
            answer[2] = function()
        # Whatever it is: the others wait in the broadcast and must hear of it.
        except Exception as error:
            told = isinstance(error, OSError | ValueError)
            answer[:2] = f"{what}: {error if told else repr(error)}", is_disk_full(error)
    if mesh.world_group is not None:
        dist.broadcast_object_list(answer, src=0, group=mesh.world_group)
    problem, full, result = answer
    if problem is not None:
        raise DiskFullError(problem) if full else CheckpointError(problem)
    value: T = result
    return value


def gather(value: T, mesh: Mesh) -> list[T]:
    """Every rank's (picklable) value, in rank order, on every rank."""
    if mesh.world_group is None:
        return [value]
    values: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(values, value, group=mesh.world_group)
    return values
