"""Scores of pictures, dealt over processes, and what scorers refuse told in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image

from soar_mega.checkpoint.agree import gather
from soar_mega.config import ConfigError
from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.plan import Chunk
from soar_mega.evaluation.scorers.make import make_scorer
from soar_mega.parallel.mesh import Mesh

# Of each picture, by (prompt, repeat): metric -> value.
PictureScores = Mapping[tuple[int, int], Mapping[str, float]]


class ScoringError(RuntimeError):
    """A scorer failed; every rank raises it with the same words."""


def parse_scorers(named: Sequence[str], setting: str) -> dict[str, str | None]:
    """Locations by name, from ``name`` and ``name=location``.

    Raises:
        ConfigError: A name comes twice or is empty.
    """
    found: dict[str, str | None] = {}
    for text in named:
        name, equals, location = text.partition("=")
        if not name or name in found:
            raise ConfigError(
                f"{setting} = {text}: a scorer is NAME or NAME=LOCATION, and each comes once"
            )
        found[name] = location if equals else None
    return found


def make_scorers(
    locations: Mapping[str, str | None], device: torch.device, setting: str
) -> list[Any]:
    """The scorers, on a device.

    Raises:
        ConfigError: One is unknown or cannot be loaded; says why.
    """
    found = []
    for name, location in locations.items():
        try:
            found.append(make_scorer(name, {} if location is None else location, device))
        except (ValueError, OSError, ImportError) as error:
            given = name if location is None else f"{name}={location}"
            raise ConfigError(f"{setting} = {given}: {error}") from error
    return found


def scores_pictures(scorer: Any) -> bool:
    """Whether it is a ``Scorer``."""
    return hasattr(scorer, "score")


def scores_sets(scorer: Any) -> bool:
    """Whether it is a ``SetScorer``."""
    return hasattr(scorer, "score_set")


def overall_of(scorer: Any) -> Literal["pictures", "categories"]:
    """What its overall value is the mean of; a set's value is over pictures."""
    found: Literal["pictures", "categories"] = getattr(scorer, "overall", "pictures")
    return found


def try_out(scorers: Sequence[Any], prompts: Sequence[Prompt], size: int, setting: str) -> None:
    """Let scorers judge a blank picture for a prompt of each category: hours before they have to.

    Args:
        scorers: Those of whole sets are left out.
        prompts: Of the evaluation.
        size: Side of its pictures.
        setting: That named the scorers.

    Raises:
        ConfigError: One cannot judge such pictures or prompts; says why.
    """
    few = list({prompt.category: prompt for prompt in reversed(prompts)}.values())
    blank = Image.new("RGB", (size, size), "white")
    for scorer in scorers:
        if not scores_pictures(scorer):
            continue
        try:
            _checked(scorer.name, scorer.score([blank] * len(few), few), len(few))
        except (ValueError, KeyError, ScoringError) as error:
            told = error if isinstance(error, ValueError | ScoringError) else repr(error)
            raise ConfigError(
                f"{setting} {scorer.name} cannot judge {size} px pictures of these prompts: {told}"
            ) from error


def _checked(name: str, found: Sequence[Mapping[str, float]], count: int) -> list[dict[str, float]]:
    """What a scorer returned of pictures, as plain numbers.

    Raises:
        ScoringError: It is not one finite number a metric, or not of every picture.
    """
    if len(found) != count:
        raise ScoringError(f"{name} returned {len(found)} scores for {count} pictures")
    plain = [{metric: float(value) for metric, value in one.items()} for one in found]
    for one in plain:
        for metric, value in one.items():
            if not math.isfinite(value):
                raise ScoringError(f"{name}/{metric} of a picture is {value}")
    return plain


def score_chunks(
    scorer: Any,
    chunks: Sequence[Chunk],
    prompts: Sequence[Prompt],
    open_picture: Callable[[tuple[int, int]], Image.Image],
    mine: Callable[[int], bool],
    mesh: Mesh,
) -> dict[tuple[int, int], dict[str, float]]:
    """Scores of all pictures, in order, on every rank; all ranks call it.

    Args:
        scorer: A ``Scorer``.
        chunks: All of them; each is scored whole.
        prompts: By number.
        open_picture: A picture by (prompt, repeat).
        mine: Whether this rank scores a chunk, by its number; one rank must.
        mesh: This process.

    Raises:
        ScoringError: On every rank, if it failed on any.
    """
    own: dict[tuple[int, int], dict[str, float]] = {}

    def work() -> None:
        for number, chunk in enumerate(chunks):
            if mine(number):
                pictures = [open_picture(picture) for picture in chunk.pictures]
                found = scorer.score(pictures, [prompts[n] for n in chunk.prompts])
                checked = _checked(scorer.name, found, len(pictures))
                own.update(zip(chunk.pictures, checked, strict=True))

    problem = _problem_of(work)
    everyone = gather((own, problem), mesh)
    _raise_first(scorer.name, [found for _, found in everyone])
    found = {picture: scores for part, _ in everyone for picture, scores in part.items()}
    return {picture: found[picture] for picture in sorted(found)}


def score_set(
    scorer: Any,
    pictures: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    mesh: Mesh,
) -> dict[str, float]:
    """Metrics of the whole set, computed on rank 0, NaN where there is none; all ranks call it.

    Args:
        scorer: A ``SetScorer``.
        pictures, prompts: All, in order; other ranks' are not looked at.
        mesh: This process.

    Raises:
        ScoringError: On every rank.
    """
    found: dict[str, float] = {}

    def work() -> None:
        if mesh.rank == 0:
            if len(pictures) < 2:
                raise ValueError(f"a set has at least two pictures, this one {len(pictures)}")
            metrics = scorer.score_set(pictures, prompts)
            found.update({metric: float(value) for metric, value in metrics.items()})

    problem = _problem_of(work)
    everyone = gather((found, problem), mesh)
    _raise_first(scorer.name, [told for _, told in everyone])
    return everyone[0][0]


def _problem_of(work: Callable[[], None]) -> str | None:
    """Whatever a scorer raises: the others wait to hear of it."""
    try:
        work()
    except Exception as error:
        told = isinstance(error, OSError | ValueError | ScoringError)
        return str(error) if told else repr(error)
    return None


def _raise_first(name: str, problems: Sequence[str | None]) -> None:
    for rank, problem in enumerate(problems):
        if problem is not None:
            where = f" on rank {rank}" if len(problems) > 1 else ""
            raise ScoringError(f"the scorer {name} failed{where}: {problem}")
