"""What is done about a step whose loss or gradient is not finite, or far out of proportion.

Such a step is skipped: weights, EMA and optimizer stay as they are, to the bit, and the step counts
as done (the next one has other samples). Loss and gradient norm are sums over all ranks with the
same bits on each, so every rank decides alike without talking.

Skips are bounded, because a model that is already broken makes every step look like this one: after
``train.max_skipped_steps`` in a row the next one ends the run.

Why a checkpoint waits for an accepted step (see ``Health.ok``): the weights of a skipped step are
those of the last accepted one, but nobody knows yet whether the sample was bad or the weights are.
The next accepted step tells.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Self

from soar_mega.config.schema import TrainConfig

WINDOW = 128  # accepted steps that the median is taken of
FEWEST = 16  # with fewer, nothing is out of proportion


class SickRunError(RuntimeError):
    """Too many steps in a row had to be skipped; raised on every rank alike."""


class Health:
    """Accepts or refuses steps, one after another.

    Args:
        config: Its ``spike_factor`` and ``max_skipped_steps`` are the policy.

    Attributes:
        problem: Why the last judged step was skipped; None if it was accepted.
        skipped_steps: Skipped since the run began.
        skipped_in_a_row: Skipped since the last accepted step.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._spike_factor, self._max_skipped_steps = config.spike_factor, config.max_skipped_steps
        # Accepted values only: one NaN in here and every later comparison would be False.
        self._accepted: dict[str, deque[float]] = {
            "train/loss": deque(maxlen=WINDOW),
            "optim/grad_norm": deque(maxlen=WINDOW),
        }
        self.problem: str | None = None
        self.skipped_steps = self.skipped_in_a_row = 0

    def judge(self, loss: float, gradient_norm: float) -> bool:
        """Whether the step with these values is to be applied; what is decided is remembered.

        Args:
            loss: Of the global batch.
            gradient_norm: Of the whole model, before clipping.
        """
        values = {"train/loss": loss, "optim/grad_norm": gradient_norm}
        self.problem = self._not_finite(values) or self._spike(values)
        if self.problem is not None:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return False
        self.skipped_in_a_row = 0
        for name, value in values.items():
            self._accepted[name].append(value)
        return True

    @property
    def ok(self) -> bool:
        """Whether the last judged step was accepted (also before the first)."""
        return self.skipped_in_a_row == 0

    @property
    def exhausted(self) -> bool:
        """Whether more steps in a row were skipped than may be."""
        return self.skipped_in_a_row > self._max_skipped_steps

    @property
    def metrics(self) -> dict[str, float]:
        """``health/*`` so far."""
        return {"health/skipped_steps": float(self.skipped_steps)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (plain JSON): a resumed run decides as the unbroken one."""
        return {
            "accepted": {name: list(values) for name, values in self._accepted.items()},
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    @classmethod
    def from_state(cls, state: Any, config: TrainConfig) -> Self:
        """Take up what ``state`` gave.

        Raises:
            ValueError: It is damaged.
        """
        health = cls(config)
        if not isinstance(state, Mapping):
            raise ValueError(f"the recorded health is {state!r}, not a mapping")
        accepted = state.get("accepted")
        if not isinstance(accepted, Mapping) or accepted.keys() != health._accepted.keys():
            raise ValueError(f"the recorded health needs the lists {', '.join(health._accepted)}")
        lengths = set()
        for name, values in accepted.items():
            if not isinstance(values, list) or not all(
                type(value) is float and math.isfinite(value) for value in values
            ):
                raise ValueError(f"the recorded {name} is not a list of finite numbers")
            lengths.add(len(values))
            health._accepted[name].extend(values)
        if len(lengths) != 1 or max(lengths) > WINDOW:
            raise ValueError(f"the recorded lists must be equally long, at most {WINDOW}")
        total, row = state.get("skipped_steps"), state.get("skipped_in_a_row")
        if type(total) is not int or type(row) is not int or not 0 <= row <= total:
            raise ValueError(f"skipped_steps {total!r} and skipped_in_a_row {row!r} are no counts")
        health.skipped_steps, health.skipped_in_a_row = total, row
        return health

    @staticmethod
    def _not_finite(values: Mapping[str, float]) -> str | None:
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        return " and ".join(wrong) or None

    def _spike(self, values: Mapping[str, float]) -> str | None:
        if self._spike_factor is None:
            return None
        for name, value in values.items():
            window = self._accepted[name]
            if len(window) < FEWEST:
                continue
            usual = median(window)
            # No multiple of 0 says anything.
            if usual > 0 and value > self._spike_factor * usual:
                return (
                    f"{name} is {value:.4g}, {value / usual:.4g} times the median of the last "
                    f"{len(window)} accepted steps, {usual:.4g}; train.spike_factor allows "
                    f"{self._spike_factor:g} times"
                )
        return None
