"""The state of delayed scaling: of each FP8 linear its scales and histories of largest magnitudes.

No other recipe has any. Names and shapes are those of Transformer Engine 2.20: ``fp8_meta`` of a
module holds ``scaling_fwd`` (input, weight, output) and ``scaling_bwd`` (output and input
gradient), each with ``scale`` ``(n,)`` and ``amax_history`` ``(history, n)``, fp32. Taken as
tensors: Transformer Engine's own extra state is a pickle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from soar_mega.backends.te.linear import TELinear

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")


def scaling_state(modules: Mapping[str, nn.Module]) -> dict[str, list[Tensor]]:
    """Name of each FP8 linear -> its state, as flat views of the live tensors.

    Args:
        modules: Name -> module, all of a stage's; linears that have not run are set up.
    """
    found = {}
    for name, module in modules.items():
        if isinstance(module, TELinear):
            _set_up(module)
            meta = module.inner.fp8_meta
            found[name] = [
                x.view(-1) for d in _DIRECTIONS for x in (meta[d].scale, meta[d].amax_history)
            ]
    return found


def _set_up(linear: TELinear) -> None:
    meta = linear.inner.fp8_meta
    if "scaling_fwd" not in meta:
        # As te.Linear does before it takes its extra state.
        meta.update(num_gemms=1, recipe=linear.recipe)
        linear.inner.init_fp8_meta_tensors(linear.recipe)


@contextmanager
def untouched(linears: Iterable[TELinear]) -> Iterator[None]:
    """Context in which passes leave no trace in the scaling of the forwards to come.

    A pass without gradient notes its magnitudes all the same, and the next one with gradient would
    take them into the history.
    """
    rows = [
        linear.inner.fp8_meta["scaling_fwd"].amax_history[0]
        for linear in linears
        if "scaling_fwd" in linear.inner.fp8_meta
    ]
    kept = torch.cat(rows) if rows else None
    try:
        yield
    finally:
        if kept is not None:
            torch._foreach_copy_(rows, list(kept.split([row.numel() for row in rows])))
