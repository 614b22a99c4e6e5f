"""What an evaluation is to do, and what of it can be refused before anything is started."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.checkpoint.weight_sources import Weights
from soar_mega.config import ConfigError
from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.models import ModelSource, find_model
from soar_mega.evaluation.painter import Batch
from soar_mega.evaluation.prompt_sets import read_prompts

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Settings:
    """What a person asked for, but for models and scorers; names are the command line's.

    Attributes:
        prompts: File of the prompt set.
        format: Of that file, see ``read_prompts``.
        limit: Only the first prompts; None: all.
        repeats: Pictures of each prompt.
        seed: Of the first prompt's pictures; the next prompt has the next one.
        steps: Sampling steps.
        guidance: Guidance scale.
        size: Side of the pictures in pixels; None: what each model's config names.
        batch: Pictures of one pass.
        weights: Which of a checkpoint's.
        tensor_parallel, pipeline_parallel: Ranks that share a model.
    """

    prompts: Path
    format: str = "lines"
    limit: int | None = None
    repeats: int = 1
    seed: int = 0
    steps: int = 28
    guidance: float = 4.5
    size: int | None = None
    batch: int = 8
    weights: Weights = "ema"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


@dataclass(frozen=True)
class Model:
    """One of the models.

    Attributes:
        given: As on the command line.
        source: What was found there.
        size: Side of its pictures in pixels.
    """

    given: str
    source: ModelSource
    size: int


@dataclass(frozen=True)
class Plan:
    """An evaluation that was looked through.

    Attributes:
        settings: As given.
        prompts: After ``limit``.
        prompts_hash: Of all texts of the file.
        models: By label.
    """

    settings: Settings
    prompts: list[Prompt]
    prompts_hash: str
    models: dict[str, Model]

    def chunks(self) -> list[Chunk]:
        """All pictures, in the order of repeats, then prompts."""
        return cut(len(self.prompts), self.settings.repeats, self.settings.batch)

    def batch(self, chunk: Chunk) -> Batch:
        """What a painter is asked for."""
        texts = [self.prompts[number].text for number in chunk.prompts]
        return Batch(texts, [self.settings.seed + n for n in chunk.prompts], chunk.repeat)


@dataclass(frozen=True)
class Chunk:
    """Pictures that are drawn, and scored, together, whoever does it.

    Attributes:
        prompts: Their numbers.
        repeat: Of all of them.
    """

    prompts: range
    repeat: int

    @property
    def pictures(self) -> list[tuple[int, int]]:
        """(prompt, repeat) of each."""
        return [(number, self.repeat) for number in self.prompts]


def cut(prompts: int, repeats: int, batch: int) -> list[Chunk]:
    """All pictures in chunks of consecutive prompts; more repeats or prompts change none of them.

    A last chunk may be shorter; a painter fills it up.
    """
    return [
        Chunk(range(start, min(start + batch, prompts)), repeat)
        for repeat in range(repeats)
        for start in range(0, prompts, batch)
    ]


def prepare(settings: Settings, models: Sequence[str], world_size: int) -> Plan:
    """Look through everything that needs no other process; a hub model is downloaded.

    Args:
        settings: What to do.
        models: ``PATH``, ``owner/name@COMMIT`` or ``label=`` one of them.
        world_size: Number of processes.

    Raises:
        ConfigError, ValueError, OSError: The first problem, naming setting, value, rule and fix.
    """
    _check_numbers(settings)
    ranks = settings.tensor_parallel * settings.pipeline_parallel
    if world_size % ranks:
        raise ConfigError(
            f"--tensor-parallel = {settings.tensor_parallel} times --pipeline-parallel = "
            f"{settings.pipeline_parallel} is {ranks}, which does not divide the number of "
            f"processes, {world_size}: change them, or start a multiple of {ranks} processes with "
            "torchrun or srun"
        )
    prompts = read_prompts(settings.prompts, settings.format)
    if not prompts:
        raise ConfigError(f"--prompts = {settings.prompts} holds no prompt: give another file")
    found = {}
    for label, given in label_models(models).items():
        source = find_model(given, settings.weights)
        size = settings.size or source.resolution
        source.check_size(size, size, "--size")
        _check_layout(settings, source, label)
        found[label] = Model(given, source, size)
    digest = hashlib.sha256(json.dumps([prompt.text for prompt in prompts]).encode())
    return Plan(settings, prompts[: settings.limit], f"sha256:{digest.hexdigest()}", found)


def _check_numbers(settings: Settings) -> None:
    least = {
        "limit": 1,
        "repeats": 1,
        "seed": 0,
        "steps": 1,
        "size": 1,
        "batch": 1,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
    }
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} = {value} must be at least {low}")
    if not 0 <= settings.guidance < float("inf"):
        raise ConfigError(f"--guidance = {settings.guidance} must be a number, at least 0")
    if settings.seed >= 2**31:
        raise ConfigError(f"--seed = {settings.seed} must be below 2^31")


def _check_layout(settings: Settings, source: ModelSource, label: str) -> None:
    size, architecture = settings.tensor_parallel, source.architecture
    if not architecture.can_cut(size):
        heads = range(1, architecture.num_attention_heads + 1)
        works = [n for n in heads if architecture.can_cut(n)]
        raise ConfigError(
            f"--tensor-parallel = {size} does not cut the {architecture.num_attention_heads} heads "
            f"and the width {architecture.width} of {label}: use one of {works}"
        )
    if settings.pipeline_parallel > architecture.num_layers:
        raise ConfigError(
            f"--pipeline-parallel = {settings.pipeline_parallel}, but {label} has "
            f"{architecture.num_layers} layers and every stage needs one: use at most "
            f"{architecture.num_layers}"
        )


def label_models(models: Sequence[str]) -> dict[str, str]:
    """Label -> path; where none is given the path's last part, of a run's checkpoint with the run.

    Raises:
        ConfigError: Two have the same label, or one is no file name.
    """
    found: dict[str, str] = {}
    for text in models:
        label, equals, given = text.partition("=")
        if not equals or Path(text).exists() or "/" in label:
            label, given = _label_of(text), text
        if not _LABEL.fullmatch(label):
            raise ConfigError(
                f"MODEL {text}: the label {label!r} names a folder of pictures, so it must be "
                "letters, digits, '.', '_' and '-': give another as LABEL=MODEL"
            )
        if label in found:
            raise ConfigError(
                f"MODEL {text}: {found[label]} has the label {label}, too: give them labels of "
                "their own, as LABEL=MODEL"
            )
        found[label] = given
    return found


def _label_of(given: str) -> str:
    path = Path(given.rpartition("@")[0] or given).resolve()
    parts = [part for part in path.parts if part != "checkpoints"]
    name = "-".join(parts[-2:]) if path.name.startswith("step-") else path.name
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def drawn_from(plan: Plan, label: str, dtype: str) -> dict[str, Any]:
    """What the pictures of a model follow from: plain values, the same in every layout."""
    model, settings = plan.models[label], plan.settings
    return {
        "model": dict(model.source.identity),
        "prompts": plan.prompts_hash,
        "seed": settings.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": model.size,
        "batch": settings.batch,
        "max_sequence_length": model.source.max_sequence_length,
        "dtype": dtype,
    }
