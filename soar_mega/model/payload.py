"""What one pipeline stage sends to the next: both streams and the conditioning vector.

A payload travels as one flat buffer, so that a hop is one message; so does its gradient. The
conditioning vector is sent and not computed again: that would put the same MLPs on every stage. Its
gradient at a stage is the downstream one plus the stage's own.

Legend: B rows, D width; ``image_lBD`` and ``text_tBD`` are one tensor rank's share of the tokens
with sequence parallel (padded to equal shares), all of them without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from soar_mega.passes import ModelInput

Shape = tuple[int, ...]


class PassSize(NamedTuple):
    """What decides every shape of a pass, known on all stages before it runs.

    Attributes:
        rows: States times samples.
        height, width: Of the latents.
        text_length: Text tokens, without padding.
    """

    rows: int
    height: int
    width: int
    text_length: int

    @staticmethod
    def of(x: ModelInput) -> PassSize:
        """The size of the pass that starts with ``x``."""
        rows, _, height, width = x.latent_BCHW.shape
        return PassSize(rows, height, width, x.condition.text_BTE.shape[1])


@dataclass(frozen=True)
class PayloadShapes:
    """Shapes of a payload's tensors, which lie in this order in its buffer."""

    image_lBD: Shape
    text_tBD: Shape
    conditioning_BD: Shape

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        """In the order of the buffer."""
        return self.image_lBD, self.text_tBD, self.conditioning_BD

    @property
    def numel(self) -> int:
        """Elements of the flat buffer."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Payload:
    """The input of a stage's blocks and, but for the last stage, their output; or the gradient of
    either. All three tensors are in the compute dtype."""

    image_lBD: Tensor
    text_tBD: Tensor
    conditioning_BD: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors in the order of the buffer."""
        return self.image_lBD, self.text_tBD, self.conditioning_BD

    def pack(self) -> Tensor:
        """The payload as a new flat buffer, cut from any graph."""
        return torch.cat([x.detach().reshape(-1) for x in self.tensors])

    @staticmethod
    def unpack(buffer: Tensor, shapes: PayloadShapes) -> Payload:
        """The payload in ``buffer``: contiguous views, nothing is copied.

        Raises:
            ValueError: The buffer's size is not that of ``shapes``.
        """
        if buffer.shape != (shapes.numel,):
            raise ValueError(
                f"a payload of {shapes} needs a flat buffer of {shapes.numel} elements, but this "
                f"one is {tuple(buffer.shape)}: both ends must agree on the size of the pass"
            )
        parts = buffer.split([math.prod(shape) for shape in shapes.shapes])
        return Payload(*(x.view(shape) for x, shape in zip(parts, shapes.shapes, strict=True)))

    def leaves(self) -> Payload:
        """The same memory as the leaves of a stage's graph, which its backward gives gradients."""
        return Payload(*(x.detach().requires_grad_() for x in self.tensors))

    def gradient(self) -> Payload:
        """What a backward has left in ``leaves``: what the stage before is waiting for.

        Raises:
            RuntimeError: There was none; every stage gives all three tensors a gradient.
        """
        gradients = [x.grad for x in self.tensors]
        if any(x is None for x in gradients):
            raise RuntimeError("the payload has no gradient: run the stage's backward first")
        return Payload(*gradients)  # type: ignore[arg-type]

    def backward(self, gradient: Payload) -> None:
        """Backward of the stage that made this payload, from the next stage's ``gradient``."""
        torch.autograd.backward(self.tensors, gradient.tensors)
