"""What an evaluation is made of: prompts with what they ask for, and scorers of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set.

    Attributes:
        text: What the model is asked for.
        category: What scores are grouped by, such as GenEval's tag; empty where a set has none.
        truth: What a scorer needs to judge a picture, by the words of the set's own format
            (GenEval's ``include`` and ``exclude``, OCR's ``text``); plain JSON values.
    """

    text: str
    category: str = ""
    truth: Mapping[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """Judges pictures one by one: a score never depends on what else is scored with it.

    Attributes:
        name: As on the command line and before the slash of its metrics (``geneval``).
        citation: Who defined the score: paper and weights.
        overall: What the one number of a set is a mean of: its ``pictures``, or the means of its
            ``categories``, whatever their sizes (GenEval).
    """

    name: str
    citation: str
    overall: Literal["pictures", "categories"]

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """Metrics of each picture (``{"correct": 1.0}``), higher being better.

        Args:
            pictures: RGB.
            prompts: That of each picture.

        Raises:
            ValueError: A prompt lacks what this scorer needs.
        """


class SetScorer(Protocol):
    """Judges a whole set of pictures at once, such as a Frechet distance."""

    name: str
    citation: str

    def score_set(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> dict[str, float]:
        """Metrics of the set.

        Args:
            pictures: RGB, at least two.
            prompts: That of each picture.
        """
