"""A step's samples as tensors, before they become microbatches.

Legend: B samples of a microbatch, C/H/W latent channels, height, width, T text tokens, E text
width, V pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from soar_mega.data.plan import StepPlan
from soar_mega.passes import TextCondition


@dataclass(frozen=True)
class Rows:
    """The samples of one microbatch, on the mesh's device.

    Attributes:
        mean_BCHW: Of the VAE's posterior, raw.
        logvar_BCHW: Its log-variance.
        prompt: Text conditions.
        bad_B: uint8 on the CPU: 0, or 1 + the place in ``BAD_KINDS`` of what is wrong; the rest of
            the row means nothing then.
    """

    mean_BCHW: Tensor
    logvar_BCHW: Tensor
    prompt: TextCondition
    bad_B: Tensor


class RowSource(Protocol):
    """Where rows come from: pictures encoded now, or encoded sets.

    Attributes:
        empty: Condition of the empty prompt, with B = 1.
    """

    empty: TextCondition

    def prefetch(self, plan: StepPlan) -> None:
        """Begin to read; every plan is handed in once, in order, before its ``rows``."""

    def rows(self, plan: StepPlan) -> list[Rows]:
        """The microbatches of a plan, in slot order.

        A collective over the ranks of one model: all call it for the same plans.
        """

    def close(self) -> None:
        """Stop the threads; what they read ahead is dropped."""
