"""What evaluations of a run draw and who judges it: read and tried out before the run starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soar_mega.config import Config, ConfigError
from soar_mega.config.schema import ValidationConfig
from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.prompt_sets import read_prompts
from soar_mega.evaluation.scoring import make_scorers, parse_scorers, try_out
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.processes import device_of

_SCORERS = "validation.evaluate_scorers"


def read_evaluated(settings: ValidationConfig) -> tuple[Prompt, ...]:
    """The prompts; none where nothing is evaluated.

    Raises:
        ConfigError: The file cannot be read or holds none, or a scorer is named twice.
    """
    if settings.evaluate_steps is None or settings.evaluate_prompts is None:
        return ()
    parse_scorers(settings.evaluate_scorers, _SCORERS)
    setting = f"validation.evaluate_prompts = {settings.evaluate_prompts}"
    try:
        prompts = read_prompts(Path(settings.evaluate_prompts), settings.evaluate_format)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{setting} (validation.evaluate_format = {settings.evaluate_format}): {error}"
        ) from error
    if not prompts:
        raise ConfigError(f"{setting} holds no prompt: give another file")
    return tuple(prompts)


def load_scorers(
    config: Config, prompts: Sequence[Prompt], process: ProcessEnvironment
) -> tuple[Any, ...]:
    """The scorers on this process's device, tried on a blank picture; none without prompts.

    Raises:
        ConfigError: One cannot be loaded, or cannot judge such pictures or prompts.
    """
    if not prompts:
        return ()
    locations = parse_scorers(config.validation.evaluate_scorers, _SCORERS)
    scorers = make_scorers(locations, device_of(config.run.device, process), _SCORERS)
    try_out(scorers, prompts, config.data.resolution, f"{_SCORERS}:")
    return tuple(scorers)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of texts and their order, which say who draws what."""
    return hashlib.sha256(json.dumps([prompt.text for prompt in prompts]).encode()).hexdigest()
