"""The two ends of the pipeline: inputs made on the first stage, outputs used on the last.

``ObjectiveEnds`` trains, ``ForwardEnds`` only looks at velocities. Both ends of an objective begin
from the same microbatch and draw the same numbers, so what one rank knows the other knows too.

Legend: B rows, C/H/W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.model.payload import PassSize
from soar_mega.passes import LossTerms, MicroBatch, ModelInput, Objective, Pass


class ObjectiveEnds:
    """A step's microbatches under an objective.

    The objective's record of a microbatch is begun when it is first needed and dropped after its
    last use on this rank.

    Args:
        objective: Makes inputs and takes outputs.
        microbatches: This data-parallel rank's share of the step.
        normaliser: The global loss denominator, 0-d.
        ends: How many of the two ends this rank is.
        is_last: Whether it is the last one.
    """

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[MicroBatch],
        normaliser: Tensor,
        *,
        ends: int,
        is_last: bool,
    ) -> None:
        self._objective, self._microbatches = objective, microbatches
        self._normaliser, self._is_last = normaliser, is_last
        self._uses = [ends * len(objective.passes())] * len(microbatches)
        self._states: dict[int, Any] = {}
        self._terms: dict[int, LossTerms] = {}

    def size(self, p: Pass, microbatch: int) -> PassSize:
        """Known on every rank, without beginning the microbatch."""
        micro = self._microbatches[microbatch]
        rows, _, height, width = micro.clean_BCHW.shape
        return PassSize(p.states * rows, height, width, micro.prompt.text_BTE.shape[1])

    def make_input(self, p: Pass, microbatch: int) -> ModelInput:
        made = self._objective.make_input(p, self._state(microbatch))
        self._used(microbatch)
        return made

    def take_output(self, p: Pass, microbatch: int, velocity_BCHW: Tensor) -> Tensor | None:
        loss = self._objective.take_output(
            p, self._state(microbatch), velocity_BCHW, self._normaliser
        )
        self._used(microbatch)
        return loss

    def hand_over(self, microbatch: int) -> Tensor:
        return self._objective.hand_over(self._state(microbatch))

    def hand_over_like(self, microbatch: int, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(self._microbatches[microbatch].clean_BCHW, dtype=dtype)

    def receive(self, microbatch: int, handed: Tensor) -> None:
        self._objective.receive(self._state(microbatch), handed)

    def terms(self) -> list[LossTerms]:
        """Of each microbatch on the last stage's rank, after the step; none elsewhere."""
        return [self._terms[m] for m in range(len(self._microbatches))] if self._is_last else []

    def _state(self, microbatch: int) -> Any:
        if microbatch not in self._states:
            self._states[microbatch] = self._objective.begin(self._microbatches[microbatch])
        return self._states[microbatch]

    def _used(self, microbatch: int) -> None:
        self._uses[microbatch] -= 1
        if self._uses[microbatch] == 0:
            state = self._states.pop(microbatch)
            if self._is_last:
                self._terms[microbatch] = self._objective.terms(state)


class ForwardEnds:
    """Velocities of given inputs, without gradient; each input counts as a microbatch.

    Attributes:
        velocities: By input, on the last stage's rank.
    """

    def __init__(self, inputs: Sequence[ModelInput]) -> None:
        self._inputs = inputs
        self.velocities: dict[int, Tensor] = {}

    def size(self, p: Pass, microbatch: int) -> PassSize:
        return PassSize.of(self._inputs[microbatch])

    def make_input(self, p: Pass, microbatch: int) -> ModelInput:
        return self._inputs[microbatch]

    def take_output(self, p: Pass, microbatch: int, velocity_BCHW: Tensor) -> None:
        self.velocities[microbatch] = velocity_BCHW

    def hand_over(self, microbatch: int) -> Tensor:
        raise RuntimeError("a forward hands nothing over")

    def hand_over_like(self, microbatch: int, dtype: torch.dtype) -> Tensor:
        raise RuntimeError("a forward hands nothing over")

    def receive(self, microbatch: int, handed: Tensor) -> None:
        raise RuntimeError("a forward hands nothing over")
