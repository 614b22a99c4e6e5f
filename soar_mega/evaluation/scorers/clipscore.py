"""CLIPScore: does a picture match its prompt in the eyes of CLIP ViT-L/14?

Hessel et al. define 2.5 * max(cosine, 0). Papers on SD3, Flow-GRPO's and SOAR's among them, print
the cosine itself (0.285 for SD3.5-M on DrawBench), and so does this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.clip import Clip, each
from soar_mega.evaluation.scorers.weights import CLIP_L, Weights


class ClipScore:
    """Metric ``cosine``, -1 to 1, of picture and prompt."""

    name = "clipscore"
    citation = (
        "Hessel et al. 2021, CLIPScore, arXiv 2104.08718 (without its factor 2.5); weights: "
        "Radford et al. 2021, openai/clip-vit-large-patch14"
    )
    overall: Literal["pictures", "categories"] = "pictures"
    needs: tuple[Weights, ...] = (CLIP_L,)

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: torch.device | str) -> ClipScore:
        """From the folders of ``needs`` by name."""
        return cls(Clip.load(folders[CLIP_L.name], device))

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As ``Scorer.score``."""
        return each("cosine", pictures, prompts, lambda p, q: self._clip.cosine(p, q.text))
