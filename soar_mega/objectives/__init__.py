"""What the model is trained on: pure tensor functions and the objectives built on them.

``flow_matching`` (pretraining and SFT) and ``soar`` implement ``passes.Objective``.
"""

from __future__ import annotations

from typing import Any

import torch

from soar_mega.objectives.flow_matching import FlowMatching
from soar_mega.objectives.settings import check_soar, has_aux_terms
from soar_mega.objectives.soar import Soar
from soar_mega.passes import Objective

__all__ = ["FlowMatching", "Soar", "make_objective"]


def make_objective(
    config: Any, *, shift: float, seed: int, dtype: torch.dtype = torch.float32
) -> Objective:
    """The objective of a config's ``objective`` section.

    SOAR without auxiliary terms (``lambda_aux`` = 0 or ``trajectory_length`` = 0) is flow matching
    and gives that very object: same bits, no rollout.

    Args:
        config: Settings by attribute; ``name`` is ``flow_matching`` or ``soar``.
        shift: Shift of the sigma schedule (the scheduler's, if the config leaves it open).
        seed: Run seed, 0 <= seed < 2^64.
        dtype: Working precision of sigmas, states, targets and losses.

    Raises:
        ValueError: A setting is outside its range, or the name is unknown.
    """
    if config.name not in ("flow_matching", "soar"):
        raise ValueError(f"objective.name = {config.name!r} is neither flow_matching nor soar")
    if config.name == "soar":
        check_soar(config)
        if has_aux_terms(config):
            return Soar(config, shift=shift, seed=seed, dtype=dtype)
    return FlowMatching(config, shift=shift, seed=seed, dtype=dtype)
