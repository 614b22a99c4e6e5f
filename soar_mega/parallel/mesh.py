"""Where a process stands among all of them, and the process groups it talks through.

Ranks run tensor-parallel fastest, then data-parallel, then pipeline-parallel:
``rank = (pipeline_rank * data_size + data_rank) * tensor_size + tensor_rank``. So tensor peers are
neighbours on one node, and what crosses nodes first is the pipeline, which sends least. A mesh is
passed to whatever needs it; nothing in the project keeps the layout in a global.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Mesh:
    """One process's coordinates and groups. A group is None where its size is 1.

    Attributes:
        rank, world_size: Position among all processes.
        tensor_rank, tensor_size, tensor_group: Tensor (and sequence) parallel peers.
        data_rank, data_size, data_group: Ranks that hold the same weights and other samples.
        world_group: All processes.
        device: Where this process computes.
        pipeline_rank, pipeline_size, pipeline_group: Ranks that hold the other stages of the same
            tensor slice, for the same samples.
        model_group: The ``model_size`` ranks that hold one whole model among them (tensor and
            pipeline) and train on the same samples.
        timeout: Longest wait for another process; None: the backend's default.
    """

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    tensor_group: ProcessGroup | None
    data_group: ProcessGroup | None
    world_group: ProcessGroup | None
    device: torch.device
    pipeline_rank: int = 0
    pipeline_size: int = 1
    pipeline_group: ProcessGroup | None = None
    model_group: ProcessGroup | None = None
    timeout: timedelta | None = None

    @property
    def model_size(self) -> int:
        """Ranks that hold one whole model among them."""
        return self.tensor_size * self.pipeline_size

    @property
    def model_rank(self) -> int:
        """This process's place among them, in rank order."""
        return self.pipeline_rank * self.tensor_size + self.tensor_rank

    def pipeline_peer(self, pipeline_rank: int) -> int:
        """World rank of the process that owns other stages of this one's tensor slice."""
        return self.rank_at(self.tensor_rank, self.data_rank, pipeline_rank)

    def rank_at(self, tensor_rank: int, data_rank: int, pipeline_rank: int) -> int:
        """World rank of the process with these coordinates."""
        return (pipeline_rank * self.data_size + data_rank) * self.tensor_size + tensor_rank

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """The mesh of a lone process; needs no process group."""
        return Mesh(0, 1, 0, 1, 0, 1, None, None, None, torch.device(device))

    @staticmethod
    def build(
        tensor_size: int = 1,
        device: torch.device | str = "cpu",
        timeout: timedelta | None = None,
        pipeline_size: int = 1,
    ) -> Mesh:
        """The mesh over the initialised default process group.

        Args:
            tensor_size: Tensor-parallel ranks.
            device: Where this process computes.
            timeout: Of the groups' collectives; None: the backend's.
            pipeline_size: Pipeline-parallel ranks.

        Raises:
            ValueError: The sizes do not divide the number of processes.
        """
        model_size = tensor_size * pipeline_size
        initialised = dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if initialised else (0, 1)
        if world_size % model_size:
            raise ValueError(
                f"parallel.tensor_model_parallel_size {tensor_size} times "
                f"parallel.pipeline_model_parallel_size {pipeline_size} is {model_size}, which "
                f"does not divide the number of processes, {world_size}: change them, or start a "
                "multiple of that many with torchrun or srun"
            )
        outer, tensor_rank = divmod(rank, tensor_size)
        data_size = world_size // model_size
        pipeline_rank, data_rank = divmod(outer, data_size)
        bare = Mesh(
            rank,
            world_size,
            tensor_rank,
            tensor_size,
            data_rank,
            data_size,
            None,
            None,
            dist.group.WORLD if world_size > 1 else None,
            torch.device(device),
            pipeline_rank,
            pipeline_size,
            timeout=timeout,
        )
        return _with_groups(bare)


def own_groups(
    every: Iterable[tuple[Key, list[int]]], rank: int, timeout: timedelta | None
) -> dict[Key, ProcessGroup]:
    """Create process groups; every rank calls it with the same ones in the same order.

    Args:
        every: Key and world ranks of each group; those of one rank alone are left out.
        rank: This process's.
        timeout: Of the groups' operations; None: the backend's.

    Returns:
        The groups this process is in, by key.
    """
    own = {}
    for key, ranks in every:
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout)
            if rank in ranks:
                own[key] = group
    return own


def stage_group(mesh: Mesh) -> ProcessGroup | None:
    """The processes that own the same stages: tensor- and data-parallel; every rank calls it.

    They run the same passes in the same order. None where there is one.
    """
    T, D, P = range(mesh.tensor_size), range(mesh.data_size), range(mesh.pipeline_size)
    if mesh.pipeline_size == 1:
        return mesh.world_group
    every = ((p, [mesh.rank_at(t, d, p) for d, t in product(D, T)]) for p in P)
    return own_groups(every, mesh.rank, mesh.timeout).get(mesh.pipeline_rank)


def _with_groups(mesh: Mesh) -> Mesh:
    """The mesh with a group for each of its dimensions; every rank calls it."""
    T, D, P = range(mesh.tensor_size), range(mesh.data_size), range(mesh.pipeline_size)

    def group(every: list[list[int]]) -> ProcessGroup | None:
        return next(iter(own_groups(enumerate(every), mesh.rank, mesh.timeout).values()), None)

    def ranks(tensor: Iterable[int], data: Iterable[int], pipeline: Iterable[int]) -> list[int]:
        return [mesh.rank_at(t, d, p) for p, d, t in product(pipeline, data, tensor)]

    tensor = group([ranks(T, [d], [p]) for d, p in product(D, P)])
    data = group([ranks([t], D, [p]) for t, p in product(T, P)])
    pipeline = group([ranks([t], [d], P) for t, d in product(T, D)])
    model = tensor if pipeline is None else pipeline
    if tensor is not None and pipeline is not None:
        model = group([ranks(T, [d], P) for d in D])
    return replace(
        mesh, tensor_group=tensor, data_group=data, pipeline_group=pipeline, model_group=model
    )
