"""What a block does between its linears: plain functions of tensors, and compiled ones.

Each is several element-wise operations and at most one reduction over the width. Plain, every
operation reads and writes the tokens once more; compiled, a function is one kernel each way.
A backend whose linears torch.compile can trace compiles whole blocks with the plain functions in
them; another one takes the compiled functions.

Legend: L tokens, B samples, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Scale and shift, (B, D) each.
ScaleShift = tuple[Tensor, Tensor]


def modulated_norm(x_LBD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, the norm a layer norm over D without weights."""
    return _modulate(_layer_norm(x_LBD, eps), scale_BD, shift_BD)


def twice_modulated_norm(
    x_LBD: Tensor, first: ScaleShift, second: ScaleShift, eps: float
) -> tuple[Tensor, Tensor]:
    """Two modulations of one layer norm, which is computed once."""
    normed_LBD = _layer_norm(x_LBD, eps)
    return _modulate(normed_LBD, *first), _modulate(normed_LBD, *second)


def gated_add(x_LBD: Tensor, gate_BD: Tensor, y_LBD: Tensor) -> Tensor:
    """``x + gate * y``."""
    return torch.addcmul(x_LBD, gate_BD, y_LBD)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of any shape."""
    return F.gelu(x, approximate="tanh")


def _layer_norm(x_LBD: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_LBD, (x_LBD.shape[-1],), eps=eps)


def _modulate(x_LBD: Tensor, scale_BD: Tensor, shift_BD: Tensor) -> Tensor:
    return torch.addcmul(shift_BD, x_LBD, 1 + scale_BD)


@dataclass(frozen=True)
class Elementwise:
    """The functions of this module, plain by default."""

    modulated_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = modulated_norm
    twice_modulated_norm: Callable[
        [Tensor, ScaleShift, ScaleShift, float], tuple[Tensor, Tensor]
    ] = twice_modulated_norm
    gated_add: Callable[[Tensor, Tensor, Tensor], Tensor] = gated_add
    gelu: Callable[[Tensor], Tensor] = gelu

    @staticmethod
    def compiled(**options: Any) -> Elementwise:
        """Each function under torch.compile, on whatever device its tensors are.

        A function is compiled when it is first called, for these shapes; from its second shape on
        (text after image tokens) for any number of tokens and samples. The results differ from the
        plain ones by rounding: what the plain functions round between operations is not rounded.

        Args:
            options: Of ``torch.compile``.
        """
        plain = Elementwise()
        return Elementwise(
            **{f.name: torch.compile(getattr(plain, f.name), **options) for f in fields(plain)}
        )
