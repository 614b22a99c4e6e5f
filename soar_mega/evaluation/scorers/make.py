"""Scorers by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from soar_mega.evaluation.interface import Scorer, SetScorer
from soar_mega.evaluation.scorers.weights import ScorerError, Weights, find_all

# Name -> module and class, so that a scorer nobody asks for is not imported.
_KINDS = {
    "aesthetic": ("scorers.aesthetic", "Aesthetic"),
    "clipscore": ("scorers.clipscore", "ClipScore"),
    "geneval": ("scorers.geneval", "GenEval"),
    "handwriting": ("handwriting.scorers", "HandwritingScorer"),
    "handwriting_frechet": ("handwriting.scorers", "HandwritingFrechet"),
    "hpsv2": ("scorers.hpsv2", "HpsV2"),
    "imagereward": ("scorers.imagereward", "ImageReward"),
    "ocr": ("scorers.ocr", "Ocr"),
    "pickscore": ("scorers.pickscore", "PickScore"),
}
SCORERS = tuple(_KINDS)


def make_scorer(
    name: str,
    locations: str | Path | Mapping[str, str | Path],
    device: torch.device | str = "cpu",
) -> Scorer | SetScorer:
    """A scorer ready to use; with hub models it downloads what the cache lacks.

    Args:
        name: One of ``SCORERS``.
        locations: A folder that holds one folder of each name of ``needed_weights``; or, by such a
            name, a folder or ``owner/name@COMMIT``.
        device: Where its models run.

    Raises:
        ScorerError: No such scorer; or weights are missing or damaged: the message says what to
            download and where to put it.
    """
    kind = _kind(name)
    scorer: Scorer | SetScorer = kind.load(find_all(kind.needs, locations, name), device)
    return scorer


def find_weights(name: str, locations: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
    """The folders that ``make_scorer`` would load from: a check before anything is drawn.

    Raises:
        ScorerError: As ``make_scorer``, but for damaged files.
    """
    return find_all(_kind(name).needs, locations, name)


def needed_weights(name: str) -> tuple[Weights, ...]:
    """What a scorer loads, with where to get it and its licence.

    Raises:
        ScorerError: No such scorer.
    """
    needs: tuple[Weights, ...] = _kind(name).needs
    return needs


def _kind(name: str) -> Any:
    if name not in _KINDS:
        near = difflib.get_close_matches(name, _KINDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ScorerError(f"no scorer {name!r}: {hint}There are {', '.join(SCORERS)}")
    module, kind = _KINDS[name]
    return getattr(importlib.import_module(f"soar_mega.evaluation.{module}"), kind)
