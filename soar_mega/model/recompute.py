"""Activation checkpointing of blocks."""

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
