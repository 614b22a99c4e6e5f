"""Runs a step's passes on one process: each pass's backward right after its forward.

So the memory of a step is that of one state, however many auxiliary states an objective has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from soar_mega.passes import LossTerms, MicroBatch, ModelInput, Objective


def run_microbatches(
    stage: Callable[[ModelInput], Tensor],
    objective: Objective,
    microbatches: Sequence[MicroBatch],
    normaliser: Tensor,
) -> list[LossTerms]:
    """All passes of all microbatches; gradients add up in the parameters.

    Args:
        stage: The whole model.
        objective: Declares the passes, makes their inputs and takes their outputs.
        microbatches: This data-parallel rank's share of the step.
        normaliser: The global loss denominator, 0-d.

    Returns:
        The loss terms of each microbatch, for reporting.
    """
    terms = []
    for micro in microbatches:
        state = objective.begin(micro)
        for p in objective.passes():
            with torch.set_grad_enabled(p.grad):
                out = stage(objective.make_input(p, state))
                loss = objective.take_output(p, state, out, normaliser)
            if p.grad:
                assert loss is not None
                loss.backward()
            # Both hold the pass's graph: nothing of it may live on into the next pass.
            del out, loss
        terms.append(objective.terms(state))
    return terms
