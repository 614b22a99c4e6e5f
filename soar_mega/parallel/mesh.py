"""Where a process stands among all of them, and the process groups it talks through.

Ranks run tensor-parallel fastest, then data-parallel: ``rank = data_rank * tensor_size +
tensor_rank``, so that tensor peers are neighbours on one node. A mesh is passed to whatever needs
it; nothing in the project keeps the layout in a global.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """One process's coordinates and groups. A group is None where its size is 1.

    Attributes:
        rank, world_size: Position among all processes.
        tensor_rank, tensor_size, tensor_group: Tensor (and sequence) parallel peers.
        data_rank, data_size, data_group: Ranks that hold the same weights and other samples.
        world_group: All processes.
        device: Where this process computes.
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

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """The mesh of a lone process; needs no process group."""
        return Mesh(0, 1, 0, 1, 0, 1, None, None, None, torch.device(device))

    @staticmethod
    def build(
        tensor_size: int = 1,
        device: torch.device | str = "cpu",
        timeout: timedelta | None = None,
    ) -> Mesh:
        """The mesh over the initialised default process group.

        Args:
            tensor_size: Tensor-parallel ranks.
            device: Where this process computes.
            timeout: Of the groups' collectives; None: the backend's.

        Raises:
            ValueError: ``tensor_size`` does not divide the number of processes.
        """
        if not dist.is_initialized():
            if tensor_size != 1:
                raise ValueError(
                    f"parallel.tensor_model_parallel_size is {tensor_size}, but there is one "
                    f"process: start {tensor_size} with torchrun or srun, or set it to 1"
                )
            return Mesh.single(device)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size % tensor_size:
            raise ValueError(
                f"parallel.tensor_model_parallel_size is {tensor_size}, which does not divide the "
                f"{world_size} processes: choose a divisor of {world_size}"
            )
        data_size = world_size // tensor_size
        data_rank, tensor_rank = divmod(rank, tensor_size)

        # Every rank creates every group, in the same order: new_group is collective.
        tensor_groups = [
            dist.new_group([d * tensor_size + t for t in range(tensor_size)], timeout)
            for d in range(data_size)
            if tensor_size > 1
        ]
        data_groups = [
            dist.new_group([d * tensor_size + t for d in range(data_size)], timeout)
            for t in range(tensor_size)
            if data_size > 1
        ]
        return Mesh(
            rank=rank,
            world_size=world_size,
            tensor_rank=tensor_rank,
            tensor_size=tensor_size,
            data_rank=data_rank,
            data_size=data_size,
            tensor_group=tensor_groups[data_rank] if tensor_groups else None,
            data_group=data_groups[tensor_rank] if data_groups else None,
            world_group=dist.group.WORLD if world_size > 1 else None,
            device=torch.device(device),
        )
