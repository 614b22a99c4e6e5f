"""Loss metrics of a step: global sums over global counts, the same for every layout.

Every loss term is kept by (state, slot of the global batch); the ranks of the last pipeline stage
fill in their slots, and all ranks sum the whole table in one order, in fp64.

Legend: K auxiliary states, G slots of the global batch, B samples of a microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import LossTerms, MicroBatch


def fill_together(table: Tensor, mesh: Mesh, *, owns_last: bool) -> Tensor:
    """The sum of a table over the data-parallel ranks, each of whom filled in its own cells.

    Args:
        table: The same shape on every rank; what a rank without the last stage holds is ignored.
        mesh: This process among all; every rank calls it.
        owns_last: Whether this rank has the last pipeline stage, and with it something to tell.
    """
    if mesh.world_group is not None:
        # Tensor peers have the same numbers: one of them tells.
        if not owns_last or mesh.tensor_rank != 0:
            table = torch.zeros_like(table)
        with waiting_for("every other process, to sum losses"):
            dist.all_reduce(table, group=mesh.world_group)
    return table


def loss_metrics(
    terms: Sequence[LossTerms],
    microbatches: Sequence[MicroBatch],
    num_states: int,
    global_batch_size: int,
    lambda_aux: float,
    bins: int,
    mesh: Mesh,
) -> dict[str, float]:
    """The ``train/*`` metrics of one step.

    Args:
        terms: Of the microbatches this rank ran; none if it has not the last stage.
        microbatches: Of this rank.
        num_states: K.
        global_batch_size: G.
        lambda_aux: Weight of auxiliary terms in the total (0 where the objective has none).
        bins: Equal bins of the base state's noise level; ``train/loss_t_bin_<k>`` is the base loss
            over the samples that fell into bin k (0 is clean), left out where none did.

    Returns:
        Plain numbers, equal on every rank.
    """
    K = num_states
    # Rows: base value, base count, sigma, K auxiliary values, K auxiliary counts.
    table = torch.zeros(3 + 2 * K, global_batch_size, dtype=torch.float64, device=mesh.device)
    for term, micro in zip(terms, microbatches, strict=bool(terms)):
        rows = torch.cat(
            [
                torch.stack([term.base_B, term.base_counted_B, term.sigma_B.double()]),
                term.aux_KB,
                term.aux_counted_KB,
            ]
        )
        table[:, micro.slots_B.to(mesh.device)] = rows
    table = fill_together(table, mesh, owns_last=bool(terms)).cpu()
    base, base_count, sigma = table[0], table[1], table[2]
    aux, aux_count = table[3 : 3 + K], table[3 + K :]

    total = base.sum() + lambda_aux * aux.sum()
    count = base_count.sum() + lambda_aux * aux_count.sum()
    metrics = {
        "train/loss": _ratio(total, count),
        "train/loss_base": _ratio(base.sum(), base_count.sum()),
    }
    if K:
        metrics["train/loss_aux"] = _ratio(aux.sum(), aux_count.sum())
        metrics["train/aux_points_per_sample"] = _ratio(aux_count.sum(), base_count.sum())
    which = (sigma * bins).long().clamp(0, bins - 1)
    for k in range(bins):
        inside = (which == k) & (base_count > 0)
        if inside.any():
            metrics[f"train/loss_t_bin_{k}"] = float(base[inside].mean())
    return metrics


def _ratio(total: Tensor, count: Tensor) -> float:
    return float(total / count) if count > 0 else float("nan")


def largest_over_ranks(values: Mapping[str, Tensor], mesh: Mesh) -> dict[str, float]:
    """Each 0-d value's largest over all processes, which must hold the same names."""
    if not values:
        return {}
    stacked = torch.stack([value.to(mesh.device) for value in values.values()])
    if mesh.world_group is not None:
        with waiting_for("every other process, to compare statistics"):
            dist.all_reduce(stacked, dist.ReduceOp.MAX, group=mesh.world_group)
    return dict(zip(values, stacked.tolist(), strict=True))
