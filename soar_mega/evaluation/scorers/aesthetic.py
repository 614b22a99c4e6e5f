"""LAION's improved aesthetic predictor: how much would people like a picture, 1 to 10?

Five linear layers on CLIP ViT-L/14's normalised picture embedding; nothing lies between them, as in
the published "linearMSE" file. The prompt plays no part. The original ran CLIP in half precision.

Legend: E dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import nn

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.clip import Clip, each
from soar_mega.evaluation.scorers.weights import CLIP_L, ScorerError, Weights, fill, load_checkpoint

FILE = "sac+logos+ava1-l14-linearMSE.pth"
HEAD = Weights(
    name="improved-aesthetic-predictor",
    repository="",
    needs=(FILE,),
    fetch=(FILE,),
    url=f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{FILE}",
    terms="Apache-2.0",
)
_LAYERS = (0, 2, 4, 6, 7)  # between them lay dropouts, numbered too


class Aesthetic:
    """Metric ``rating`` of a picture alone.

    Args:
        clip: The model whose embeddings the head was trained on.
        head: (E) -> (1).
    """

    name = "aesthetic"
    citation = (
        "Schuhmann 2022, improved aesthetic predictor (used for LAION-5B, arXiv 2210.08402): "
        f"{FILE} on openai/clip-vit-large-patch14"
    )
    overall: Literal["pictures", "categories"] = "pictures"
    needs: tuple[Weights, ...] = (CLIP_L, HEAD)

    def __init__(self, clip: Clip, head: nn.Module) -> None:
        self._clip, self._head = clip, head

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: torch.device | str) -> Aesthetic:
        """From the folders of ``needs`` by name."""
        clip = Clip.load(folders[CLIP_L.name], device)
        path = folders[HEAD.name] / FILE
        head = load_head(load_checkpoint(path), "layers.", path)
        first, width = head[0].in_features, clip.model.config.projection_dim
        if first != width:
            raise ScorerError(f"{path} is for embeddings of {first} numbers, CLIP's have {width}")
        return cls(clip, head.to(device))

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As ``Scorer.score``."""
        return each("rating", pictures, prompts, lambda picture, _: self._rate(picture))

    @torch.inference_mode()
    def _rate(self, picture: Image.Image) -> float:
        return float(self._head(self._clip.picture(picture)))


def load_head(state: Mapping[str, torch.Tensor], prefix: str, path: Path) -> nn.Sequential:
    """The linear layers that a checkpoint numbers 0, 2, 4, 6 and 7 after ``prefix``.

    Raises:
        ScorerError: The file holds others.
    """
    found = {key.removeprefix(prefix): value for key, value in state.items() if prefix in key}
    renamed = {}
    for place, number in enumerate(_LAYERS):
        for part in ("weight", "bias"):
            if f"{number}.{part}" not in found:
                raise ScorerError(f"{path} has no {prefix}{number}.{part}: it is another model's")
            renamed[f"{place}.{part}"] = found.pop(f"{number}.{part}").float()
    if found:
        raise ScorerError(f"{path} has an unknown {prefix}{min(found)}: it is another model's")
    shapes = [renamed[f"{place}.weight"].shape for place in range(len(_LAYERS))]
    head = nn.Sequential(*(nn.Linear(shape[1], shape[0]) for shape in shapes))
    fill(head, renamed, path)
    return head.eval().requires_grad_(False)
