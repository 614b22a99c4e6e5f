"""How well the numbers of a step fit FP8: largest magnitudes, what overflows, what vanishes.

Gathered on the device, without a host synchronisation, from the inputs and output gradients that
the first pass of a watched step gives to the FP8 linears.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest number, and half the smallest above zero.
E4M3 = (448.0, 2.0**-10)
E5M2 = (57344.0, 2.0**-17)
_NAMES = ("amax", "underflow", "fill")


@torch.no_grad()
def fit(x: Tensor, largest: float, vanishing: float, scale: Tensor | None = None) -> Tensor:
    """How well ``x`` fits a number format, under one scale.

    Args:
        x: Any shape.
        largest: The format's largest number.
        vanishing: Half its smallest positive number.
        scale: What ``x`` is multiplied by, 0-d; None: what brings its magnitude to ``largest``, as
            current scaling does. Blockwise recipes scale more finely and lose less.

    Returns:
        ``(3,)`` fp32: the largest magnitude, the share of the elements that are not zero and become
        zero, and the scaled magnitude over ``largest``, which overflows above 1.
    """
    size = x.detach().abs()
    amax = size.amax().float()
    if scale is None:
        scale = largest / amax.clamp(min=1e-30)
    lost = (size > 0) & (size.float() * scale < vanishing)
    return torch.stack([amax, lost.float().mean(), amax * scale / largest])


class Statistics:
    """Of one step.

    Args:
        gradient_format: Of output gradients; inputs are E4M3 in every recipe.
    """

    def __init__(self, gradient_format: tuple[float, float]) -> None:
        self._gradient_format = gradient_format
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def note_input(self, x: Tensor, scale: Tensor | None) -> None:
        """What enters a linear, and what it is multiplied by if that is known before."""
        self._inputs.append(fit(x, *E4M3, scale))

    def note_gradient(self, gradient: Tensor, scale: Tensor | None) -> None:
        """The gradient of what leaves it."""
        self._gradients.append(fit(gradient, *self._gradient_format, scale))

    def largest(self) -> dict[str, Tensor]:
        """Metric -> 0-d, the largest over the linears; over ranks it is the largest again."""
        found: dict[str, Tensor] = {}
        for kind, notes in (("input", self._inputs), ("gradient", self._gradients)):
            # A rank whose blocks are all in bf16 has none, and the same names.
            values = torch.stack(notes).amax(dim=0) if notes else torch.zeros(len(_NAMES))
            found |= {f"fp8/{kind}_{n}": v for n, v in zip(_NAMES, values, strict=True)}
        return found
