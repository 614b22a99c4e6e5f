"""How a block is called: with activation checkpointing, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from soar_mega.backends import Backend

# ``run_block`` or what does the same.
BlockCall = Callable[..., Any]


class Recompute(StrEnum):
    """What a block's backward computes again."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


_aten = torch.ops.aten
# Expensive to compute and cheap to keep: matrix products and attention. Norms, modulation and GELU
# are computed again.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(
    recompute: Recompute, backend: Backend, block: Callable[..., Any], *inputs: Any
) -> Any:
    """Call ``block(*inputs)``, keeping only what ``recompute`` says for the backward."""
    if recompute is Recompute.NONE or not torch.is_grad_enabled():
        return block(*inputs)
    if recompute is Recompute.FULL:
        return backend.checkpoint(block, *inputs)
    return checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )


# One code object serves every kind of block, with and without gradient, in every size of a pass and
# of a picture. torch's default of 8 graphs is too few for that, and one more would be an error.
_MOST_GRAPHS = 2**20


def compiled_run_block(*, dynamic: bool | None = False, **options: Any) -> BlockCall:
    """``run_block`` under torch.compile, whole blocks, recomputation included.

    Blocks of a kind share their graphs: one for each size of a pass, with and without gradient.

    Args:
        dynamic: False: a graph for each size. None: from the second size on one for all, which
            may be slower; for runs with many sizes.
        options: Others of ``torch.compile``.
    """
    compiled = torch.compile(run_block, fullgraph=True, dynamic=dynamic, **options)
    limits = {"recompile_limit": _MOST_GRAPHS, "accumulated_recompile_limit": _MOST_GRAPHS}

    def call(
        recompute: Recompute, backend: Backend, block: Callable[..., Any], *inputs: Any
    ) -> Any:
        with torch._dynamo.config.patch(limits):
            return compiled(recompute, backend, block, *inputs)

    return call
