"""A model that sleeps in place of computing, for measuring the pipeline's executor on few cores.

Legend: B rows, C/H/W latent channels, height, width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from soar_mega.model.payload import PassSize, Payload, PayloadShapes
from soar_mega.passes import LossTerms, MicroBatch, ModelInput, Objective, Pass, TextCondition


def idle_microbatch() -> MicroBatch:
    """One number where a real one has a tensor."""
    nothing = torch.zeros(1, 1)
    condition = TextCondition(nothing[None], nothing)
    return MicroBatch(
        0,
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, 1, 1, 1),
        condition,
        condition,
        torch.ones(1),
    )


class SleepingStage:
    """A stage of an imaginary model; one number a tensor.

    Args:
        seconds: Of a forward, of an input gradient and of a weight gradient.
    """

    dtype = torch.float32

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.held: list[Callable[[], None]] | None = None

    def embed(self, x: ModelInput) -> Payload:
        return Payload(*(torch.zeros(1, 1, 1, requires_grad=True) for _ in range(3)))

    def run(self, payload: Payload, size: PassSize) -> Payload:
        return Payload(*_Sleep.apply(*payload.tensors, self))

    def velocity(self, payload: Payload, size: PassSize) -> Tensor:
        return sum(self.run(payload, size).tensors).view(1, 1, 1, 1)  # type: ignore[union-attr]

    def payload_shapes(self, rows: int, height: int, width: int, text_length: int) -> PayloadShapes:
        return PayloadShapes((1, 1, 1), (1, 1, 1), (1, 1, 1))

    @contextmanager
    def hold_weight_gradients(self) -> Iterator[list[Callable[[], None]]]:
        held: list[Callable[[], None]] = []
        self.held = held
        yield held
        self.held = None


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.stage = parts
        time.sleep(ctx.stage.seconds)
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stage = ctx.stage
        time.sleep(stage.seconds)
        if stage.held is None:
            time.sleep(stage.seconds)
        else:
            stage.held.append(lambda: time.sleep(stage.seconds))
        return (*gradients, None)


class IdleObjective:
    """An objective's passes without its arithmetic."""

    def __init__(self, like: Objective) -> None:
        self._passes = like.passes()

    def passes(self) -> tuple[Pass, ...]:
        return self._passes

    def begin(self, micro: MicroBatch) -> MicroBatch:
        return micro

    def count(self, micro: MicroBatch) -> Tensor:
        return torch.ones(2, dtype=torch.float64)

    def normaliser(self, counts: Tensor) -> Tensor:
        return torch.ones(())

    def make_input(self, p: Pass, state: MicroBatch) -> ModelInput:
        return ModelInput(state.clean_BCHW, state.weight_B, state.prompt)

    def take_output(
        self, p: Pass, state: MicroBatch, velocity_BCHW: Tensor, normaliser: Tensor
    ) -> Tensor | None:
        return velocity_BCHW.sum() if p.grad else None

    def hand_over(self, state: MicroBatch) -> Tensor:
        return state.clean_BCHW

    def receive(self, state: MicroBatch, guided_BCHW: Tensor) -> None:
        pass

    def terms(self, state: MicroBatch) -> LossTerms:
        return LossTerms(*(state.weight_B for _ in range(5)))
