"""The state of delayed scaling: of each FP8 linear its scales and histories of largest magnitudes.

No other recipe has any. Names and shapes are those of Transformer Engine 2.20: ``fp8_meta`` of a
module holds ``scaling_fwd`` (input, weight, output) and ``scaling_bwd`` (output and input
gradient), each with ``scale`` ``(n,)`` and ``amax_history`` ``(history, n)``, fp32. Taken as
tensors: Transformer Engine's own extra state is a pickle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from soar_mega.backends.te.linear import TELinear

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")


def scaling_state(modules: Mapping[str, nn.Module]) -> dict[str, list[Tensor]]:
    """Name of each FP8 linear -> its state, as flat views of the live tensors.

    Args:
        modules: Name -> module, all of a stage's; linears that have not run are set up.
    """
    return {name: _parts(one) for name, one in modules.items() if isinstance(one, TELinear)}


def _parts(linear: TELinear) -> list[Tensor]:
    meta = _meta(linear)
    return [x.view(-1) for d in _DIRECTIONS for x in (meta[d].scale, meta[d].amax_history)]


def _meta(linear: TELinear) -> Any:
    """``fp8_meta`` of a linear that is set up, as ``te.Linear`` is before it takes extra state."""
    meta = linear.inner.fp8_meta
    if "scaling_fwd" not in meta:
        meta.update(num_gemms=1, recipe=linear.recipe)
        linear.inner.init_fp8_meta_tensors(linear.recipe)
    return meta


class Scaling:
    """A copy of the whole state of some linears.

    A step that is refused must not leave its magnitudes behind: one infinity would keep a scale
    as it is, and one spike keep it too small, for as long as the history is (1024 passes).
    """

    def __init__(self, linears: Iterable[TELinear]) -> None:
        self._live = [part for linear in linears for part in _parts(linear)]
        self._copy = torch.cat(self._live) if self._live else None

    def put_back(self) -> None:
        """Make the linears' state what it was."""
        if self._copy is not None:
            sizes = [part.numel() for part in self._live]
            torch._foreach_copy_(self._live, list(self._copy.split(sizes)))


@contextmanager
def untouched(linears: Iterable[TELinear]) -> Iterator[None]:
    """Context in which passes leave no trace in the scaling of the forwards to come.

    A pass without gradient notes its magnitudes all the same, and the next one with gradient would
    take them into the history.
    """
    rows = [_meta(linear)["scaling_fwd"].amax_history[0] for linear in linears]
    kept = torch.cat(rows) if rows else None
    try:
        yield
    finally:
        if kept is not None:
            torch._foreach_copy_(rows, list(kept.split([row.numel() for row in rows])))
