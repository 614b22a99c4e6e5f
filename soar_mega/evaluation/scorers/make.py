"""Scorers by name."""

from __future__ import annotations

from typing import Any

import torch

from soar_mega.evaluation.scorers.digits import DigitScorer


def make_scorer(name: str, location: str | None, device: torch.device) -> Any:
    """The scorer of that name.

    Raises:
        ValueError: There is none.
    """
    if name != "digits":
        raise ValueError(f"the scorer {name!r} is unknown: use digits")
    return DigitScorer()
