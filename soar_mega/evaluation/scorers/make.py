"""Scorers by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from soar_mega.evaluation.handwriting.scorers import HandwritingFrechet, HandwritingScorer


def make_scorer(
    name: str,
    locations: str | Path | Mapping[str, str | Path],
    device: torch.device | str = "cpu",
) -> Any:
    """The scorer of that name.

    Raises:
        ValueError: There is none.
    """
    kinds = {kind.name: kind for kind in (HandwritingScorer, HandwritingFrechet)}
    if name not in kinds:
        raise ValueError(f"no scorer {name!r}: there are {', '.join(kinds)}")
    return kinds[name]()
