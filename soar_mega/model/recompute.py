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


def run_block(recompute: Recompute, block: Callable[..., Any], *inputs: Any) -> Any:
    """Call ``block(*inputs)``, keeping only what ``recompute`` says for the backward."""
    if recompute is Recompute.NONE or not torch.is_grad_enabled():
        return block(*inputs)
    # The model draws no random numbers, so there is no generator state to put back.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute is Recompute.SELECTIVE:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *inputs, **options)


# One code object serves every kind of block, with and without gradient, in every size of a pass:
# torch's default of 8 graphs is too few for that, and beyond it a block would be refused.
_MOST_GRAPHS = 256


def compiled_run_block(**options: Any) -> Callable[..., Any]:
    """``run_block`` under torch.compile, whole blocks, recomputation included.

    Blocks of a kind share their graphs: one for each size of a pass, with and without gradient.

    Args:
        options: Of ``torch.compile``; the default compiler if there are none.
    """
    # Static shapes: a run has few sizes, each a whole graph of its own that never changes.
    compiled = torch.compile(run_block, fullgraph=True, dynamic=False, **options)

    def call(recompute: Recompute, block: Callable[..., Any], *inputs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
            return compiled(recompute, block, *inputs)

    return call
