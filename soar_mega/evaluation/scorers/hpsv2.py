"""HPS v2.1: would people prefer a picture for its prompt? A CLIP ViT-H/14 trained on choices.

The number is the cosine, as published (0.279 for SD3.5-M on DrawBench). The original runs open_clip
in half precision and resizes tensors; this is transformers' model in fp32 with Pillow's resizing,
so that the fourth digit may differ. Key mapping checked against the published key names of
open_clip's ViT-H-14, not against the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.clip import Clip, each
from soar_mega.evaluation.scorers.open_clip_map import to_transformers
from soar_mega.evaluation.scorers.weights import (
    CLIP_H_SETTINGS,
    ScorerError,
    Weights,
    fill,
    load_checkpoint,
    load_part,
)

FILE = "HPS_v2.1_compressed.pt"
MODEL = Weights(
    name="HPSv2", repository="xswu/HPSv2", needs=(FILE,), fetch=(FILE,), terms="Apache-2.0"
)


class HpsV2:
    """Metric ``cosine`` of picture and prompt."""

    name = "hpsv2"
    citation = f"Wu et al. 2023, HPS v2, arXiv 2306.09341; weights: xswu/HPSv2 {FILE}"
    overall: Literal["pictures", "categories"] = "pictures"
    needs: tuple[Weights, ...] = (MODEL, CLIP_H_SETTINGS)

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: torch.device | str) -> HpsV2:
        """From the folders of ``needs`` by name."""
        from transformers import CLIPConfig, CLIPModel

        settings = folders[CLIP_H_SETTINGS.name]
        path = folders[MODEL.name] / FILE
        try:
            state = to_transformers(load_checkpoint(path))
        except KeyError as error:
            raise ScorerError(
                f"{path} holds {error}, which open_clip's ViT-H-14 has not"
            ) from error
        model = CLIPModel(load_part(CLIPConfig, settings)).float()
        fill(model, state, path)
        return cls(Clip.around(model.to(device).eval().requires_grad_(False), settings))

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As ``Scorer.score``."""
        return each("cosine", pictures, prompts, lambda p, q: self._clip.cosine(p, q.text))
