"""CLIP embeddings, one picture or text at a time.

A matrix product's last bits may change with the number of its rows. Embedding one at a time makes a
score the same however pictures are spread over processes; next to drawing a picture it costs
nothing.

Legend: E dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.weights import load_model, load_part, pil_settings


class Clip:
    """A CLIP model with its tokenizer and preprocessing.

    Args:
        model: transformers' ``CLIPModel`` in fp32.
        tokenizer: Its tokenizer.
        processor: Its image processor.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self.model, self._tokenizer, self._processor = model, tokenizer, processor
        self._length = model.config.text_config.max_position_embeddings

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str, *, settings: Path | None = None
    ) -> Clip:
        """From a folder of ``CLIPModel``; tokenizer and preprocessing from ``settings`` if given.

        Raises:
            ScorerError: A folder cannot be read.
        """
        from transformers import CLIPModel

        return cls.around(load_model(CLIPModel, folder, device), settings or folder)

    @classmethod
    def around(cls, model: Any, settings: Path) -> Clip:
        """A loaded model with tokenizer and preprocessing from the folder ``settings``."""
        from transformers import AutoImageProcessor, AutoTokenizer

        tokenizer = load_part(AutoTokenizer, settings)
        return cls(model, tokenizer, load_part(AutoImageProcessor, settings, **pil_settings()))

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines with."""
        return float(self.model.logit_scale.exp())

    @torch.inference_mode()
    def picture(self, picture: Image.Image) -> torch.Tensor:
        """Embedding (E) of length 1."""
        pixels = self._processor(images=picture.convert("RGB"), return_tensors="pt").pixel_values
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
        return _unit(self.model.visual_projection(seen)[0])

    @torch.inference_mode()
    def text(self, text: str) -> torch.Tensor:
        """Embedding (E) of length 1; a text beyond the model's length is cut off."""
        # Always full length: the model is causal, so that padding changes nothing but the shape.
        tokens = self._tokenizer(
            text,
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.model.device)
        return _unit(self.model.text_projection(self.model.text_model(ids).pooler_output)[0])

    def cosine(self, picture: Image.Image, text: str) -> float:
        """Of the two embeddings."""
        return float(self.picture(picture) @ self.text(text))


def _unit(embedding_E: torch.Tensor) -> torch.Tensor:
    return embedding_E / torch.linalg.vector_norm(embedding_E)


def each(
    name: str,
    pictures: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    score: Callable[[Image.Image, Prompt], float],
) -> list[dict[str, float]]:
    """``{name: score(picture, prompt)}`` of each pair.

    Raises:
        ValueError: Not one prompt a picture.
    """
    return [
        {name: score(picture, prompt)} for picture, prompt in zip(pictures, prompts, strict=True)
    ]
