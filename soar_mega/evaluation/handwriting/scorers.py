"""Scorers of the benchmark ``handwriting``; they need scikit-learn alone (the extra ``eval``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image

from soar_mega.data.tiny import digits
from soar_mega.data.tiny.pages import draw_pages, parse_caption
from soar_mega.evaluation.handwriting.frechet import feature_spaces, frechet_distance
from soar_mega.evaluation.handwriting.reader import read_pages
from soar_mega.evaluation.handwriting.verify import verify
from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.weights import Weights

_REFERENCE_SEED = 0
_REFERENCE_DRAWINGS = 4  # pages of each caption on the real side


class HandwritingScorer:
    """Whether each page is what its caption says, by exact rules; overall is the mean of kinds."""

    name = "handwriting"
    citation = "soar_mega.evaluation.handwriting.verify; scans: scikit-learn's digits (UCI, 1998)"
    overall: Literal["pictures", "categories"] = "categories"
    needs: tuple[Weights, ...] = ()

    @classmethod
    def load(cls, _weights: Mapping[str, Path], _device: torch.device | str) -> Self:
        """Nothing to load: the digit reader is trained on scikit-learn's scans in a second."""
        return cls()

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """``verify``'s rules for each picture.

        Raises:
            ValueError: A prompt is no caption of a page, or a picture has another size.
        """
        pages = [parse_caption(prompt.text) for prompt in prompts]
        return [verify(page, read) for page, read in zip(pages, read_pages(pictures), strict=True)]


class HandwritingFrechet:
    """``frechet_distance`` of the pictures' digits to held-out scans; lower is better."""

    name = "handwriting_frechet"
    citation = "Heusel et al. 2017, arXiv 1706.08500, on features of single digits"
    needs: tuple[Weights, ...] = ()

    @classmethod
    def load(cls, _weights: Mapping[str, Path], _device: torch.device | str) -> Self:
        """Nothing to load."""
        return cls()

    def score_set(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> dict[str, float]:
        """``pixels`` and ``reader`` distances, NaN where nearly no digit was found.

        The real side are the same captions drawn with held-out scans.

        Raises:
            ValueError: A prompt is no caption of a page, or a picture has another size.
        """
        real_NF = _real_features(tuple(prompt.text for prompt in prompts))
        drawn_NF = _digit_features(pictures)
        if len(drawn_NF) < 2:
            return {"pixels": float("nan"), "reader": float("nan")}
        real_side, drawn_side = feature_spaces(real_NF), feature_spaces(drawn_NF)
        return {space: frechet_distance(drawn_side[space], real_side[space]) for space in real_side}


@lru_cache(maxsize=1)
def _real_features(captions: tuple[str, ...]) -> np.ndarray:
    """Of the real side, kept: every model of an evaluation is compared with the same."""
    pages = [parse_caption(caption) for caption in captions]
    scans = digits.load_scans("held_out")
    real = draw_pages(pages * _REFERENCE_DRAWINGS, scans, _REFERENCE_SEED)
    return _digit_features([Image.fromarray(page) for page in real])


def _digit_features(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.concatenate([reading.features_NF for reading in read_pages(pictures)])
