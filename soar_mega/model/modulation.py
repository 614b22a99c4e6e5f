"""Adaptive layer norm: the modulations of all blocks of a stage, computed once per pass.

Their weights (a third of SD3.5-Medium's parameters) are cut over the tensor ranks by output rows;
one gather brings every block's values to every rank.

Legend: B samples, D width, N modulation vectors of one linear; ``x_FB`` features first, so that one
gather along the first dimension serves all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soar_mega.backends import Backend
from soar_mega.parallel.collectives import copy_to_tensor_ranks, gather_tokens
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh


def modulation_linear(count: int, width: int, mesh: Mesh, backend: Backend) -> nn.Module:
    """The linear that makes ``count`` modulation vectors; rows cut over the tensor ranks."""
    return backend.linear(
        ParameterLayout((count * width, width), 0, "sharded"),
        ParameterLayout((count * width,), 0, "sharded"),
        mesh,
    )


def modulations(
    conditioning_BD: Tensor, linears: Sequence[nn.Module], mesh: Mesh, *, sequence_parallel: bool
) -> list[tuple[Tensor, ...]]:
    """For each linear its modulation vectors, each ``(B, D)``.

    With sequence parallel a rank's gradient of a modulation covers its own tokens only, so the
    gather's backward sums over ranks; without, every rank has the whole gradient and keeps its
    rows.
    """
    width = conditioning_BD.shape[-1]
    active_BD = copy_to_tensor_ranks(F.silu(conditioning_BD), mesh)
    local = [linear(active_BD) for linear in linears]
    if mesh.tensor_size == 1:
        return [x.split(width, dim=-1) for x in local]
    features = [x.shape[-1] for x in local]
    local_FB = torch.cat(local, dim=-1).t()
    all_FB = gather_tokens(local_FB, mesh, partial_gradient=sequence_parallel)
    by_rank = all_FB.view(mesh.tensor_size, sum(features), -1)
    parts = by_rank.split(features, dim=1)
    return [part.flatten(0, 1).t().split(width, dim=-1) for part in parts]
