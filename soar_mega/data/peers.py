"""Work shared among the ranks that hold one model together (tensor and pipeline parallel).

Each does a contiguous share of the rows; every peer takes every row from the exchange, so that all
hold the same bits.

Legend: R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soar_mega.parallel.collectives import all_gather_into
from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh

_WHO = "the other ranks of its model, to share samples"


def own_share(count: int, mesh: Mesh) -> slice:
    """This rank's contiguous share of ``count`` rows; the last ones may be shorter."""
    size = -(-count // mesh.model_size)
    return slice(mesh.model_rank * size, (mesh.model_rank + 1) * size)


def exchange(own_R: Tensor, total: int, mesh: Mesh) -> Tensor:
    """All ``total`` rows from every peer's share, in order; a collective over the model's ranks.

    Sent as bytes: no backend then needs to know the type, and no bit changes.

    Args:
        own_R: The rows of ``own_share(total)``; its other dimensions are the same on all peers.
    """
    if mesh.model_group is None:
        return own_R
    size = -(-total // mesh.model_size)
    part_R = own_R.new_zeros(size, *own_R.shape[1:])
    part_R[: len(own_R)] = own_R
    all_R = own_R.new_empty(size * mesh.model_size, *own_R.shape[1:])
    with waiting_for(_WHO):
        all_gather_into(
            all_R.view(-1).view(torch.uint8),
            part_R.view(-1).view(torch.uint8),
            group=mesh.model_group,
        )
    return all_R[:total]


def highest(own_R: Tensor, mesh: Mesh) -> Tensor:
    """The largest value of each row over the model's ranks (uint8); a collective over them."""
    if mesh.model_group is None or len(own_R) == 0:
        return own_R
    all_PR = own_R.new_empty(mesh.model_size * len(own_R))
    with waiting_for(_WHO):
        all_gather_into(all_PR, own_R, group=mesh.model_group)
    return all_PR.view(mesh.model_size, -1).amax(dim=0)
