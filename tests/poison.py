"""Steps that go wrong on purpose, in this process."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest
from torch import Tensor

from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.training.step import Stepper

# A NaN in a sample, which all that is computed of it becomes; a sample far out of range; and
# gradients that are infinite or far too large under the loss of a healthy step.
Poison = Literal["nan sample", "huge sample", "inf gradient", "huge gradient"]
HUGE = 1000.0


@contextmanager
def poisoned(what: Poison, steps: Collection[int], *, here: bool = True) -> Iterator[None]:
    """Runs inside meet it in these steps (from 1), where this process is the one."""
    run, reduce = Stepper.run, ShardedParameters.reduce_gradients
    now = False

    def poisoned_run(self: Stepper, step: int, microbatches: Any, *rest: Any) -> dict[str, float]:
        nonlocal now
        now = here and step + 1 in steps
        if now and what.endswith("sample"):
            clean = microbatches[0].clean_BCHW.clone()
            clean[0] *= float("nan") if what == "nan sample" else HUGE
            microbatches = [replace(microbatches[0], clean_BCHW=clean), *microbatches[1:]]
        return run(self, step, microbatches, *rest)

    def poisoned_reduce(self: ShardedParameters) -> Tensor:
        if now and what == "inf gradient":
            self.flat_grad[self.total_size // 2] = float("inf")
        elif now and what == "huge gradient":
            self.flat_grad *= HUGE
        return reduce(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "run", poisoned_run)
        patch.setattr(ShardedParameters, "reduce_gradients", poisoned_reduce)
        yield
