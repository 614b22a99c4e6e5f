"""PickScore: which picture would people pick? A CLIP ViT-H/14 trained on 584,000 choices.

The number is the model's logit, 100 times the cosine: 22.34 for SD3.5-M on DrawBench. Flow-GRPO
divides it by 26 where it serves as a reward; its tables, as SOAR's, print the logit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.clip import Clip, each
from soar_mega.evaluation.scorers.weights import CLIP_FILES, Weights

MODEL = Weights(
    name="PickScore_v1",
    repository="yuvalkirstain/PickScore_v1",
    needs=CLIP_FILES,
    terms="the model card names none; the code is MIT",
)


class PickScore:
    """Metric ``logit`` of picture and prompt."""

    name = "pickscore"
    citation = (
        "Kirstain et al. 2023, Pick-a-Pic, arXiv 2305.01569; weights: yuvalkirstain/PickScore_v1"
    )
    overall: Literal["pictures", "categories"] = "pictures"
    needs: tuple[Weights, ...] = (MODEL,)

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: torch.device | str) -> PickScore:
        """From the folders of ``needs`` by name."""
        return cls(Clip.load(folders[MODEL.name], device))

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As ``Scorer.score``."""
        scale = self._clip.logit_scale
        return each("logit", pictures, prompts, lambda p, q: scale * self._clip.cosine(p, q.text))
