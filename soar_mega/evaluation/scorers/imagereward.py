"""ImageReward: BLIP, trained on rankings, on how well a picture answers its prompt and pleases.

A vision transformer reads the picture, a text encoder reads the prompt and attends to the picture,
and five linear layers turn its first token into a number, shifted and scaled to mean 0 and variance
1 over its authors' pictures (0.85 for SD3.5-M on DrawBench).

The original carries its own copy of BLIP; this runs transformers' BLIP. Key mapping checked against
the published key names, not against the weights.

Legend: B = 1 picture, T text tokens, P tokens of the picture, E width of the text encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.aesthetic import load_head
from soar_mega.evaluation.scorers.blip_map import sizes, text_tensors, vision_tensors
from soar_mega.evaluation.scorers.clip import each
from soar_mega.evaluation.scorers.weights import (
    ScorerError,
    Weights,
    fill,
    load_checkpoint,
    load_part,
    pil_settings,
)

FILE, TEXT_FILE = "ImageReward.pt", "med_config.json"
MODEL = Weights(
    name="ImageReward",
    repository="THUDM/ImageReward",
    needs=(FILE, TEXT_FILE),
    fetch=(FILE, TEXT_FILE),
    terms="Apache-2.0",
)
TOKENIZER = Weights(
    name="bert-base-uncased",
    repository="google-bert/bert-base-uncased",
    needs=("tokenizer.json",),
    fetch=("tokenizer*.json", "config.json", "vocab.txt"),
    terms="Apache-2.0",
)
_TEXT_LENGTH = 35
_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072


class ImageReward:
    """Metric ``reward`` of picture and prompt.

    Args:
        vision: transformers' ``BlipVisionModel``.
        text: ``BlipTextModel`` with cross attention.
        head: (E) -> (1).
        tokenizer: BERT's.
        processor: Image processor to the size of ``vision``.
    """

    name = "imagereward"
    citation = f"Xu et al. 2023, ImageReward, arXiv 2304.05977; weights: THUDM/ImageReward {FILE}"
    overall: Literal["pictures", "categories"] = "pictures"
    needs: tuple[Weights, ...] = (MODEL, TOKENIZER)

    def __init__(
        self, vision: Any, text: Any, head: nn.Module, tokenizer: Any, processor: Any
    ) -> None:
        self._vision, self._text, self._head = vision, text, head
        self._tokenizer, self._processor = tokenizer, processor

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: torch.device | str) -> ImageReward:
        """From the folders of ``needs`` by name."""
        from transformers import AutoTokenizer

        path = folders[MODEL.name] / FILE
        state = load_checkpoint(path)
        try:
            vision = _vision_model(state, path)
            text = _text_model(state, folders[MODEL.name] / TEXT_FILE, path)
        except KeyError as error:
            raise ScorerError(f"{path} is no ImageReward: about its tensor {error}") from error
        head = load_head(
            {k: v for k, v in state.items() if k.startswith("mlp.")}, "mlp.layers.", path
        )
        return cls(
            vision.to(device),
            text.to(device),
            head.to(device),
            load_part(AutoTokenizer, folders[TOKENIZER.name]),
            _processor(vision.config.image_size),
        )

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As ``Scorer.score``."""
        return each("reward", pictures, prompts, lambda p, q: self._reward(p, q.text))

    @torch.inference_mode()
    def _reward(self, picture: Image.Image, text: str) -> float:
        device = self._vision.device
        pixels = self._processor(images=picture.convert("RGB"), return_tensors="pt").pixel_values
        seen_BPE = self._vision(pixel_values=pixels.to(device)).last_hidden_state
        tokens = self._tokenizer(
            text,
            padding="max_length",
            max_length=_TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        read_BTE = self._text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen_BPE,
            is_decoder=False,
        ).last_hidden_state
        return (float(self._head(read_BTE[0, 0])) - _MEAN) / _DEVIATION


def _vision_model(state: Mapping[str, torch.Tensor], path: Path) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    found = sizes(state)
    config = BlipVisionConfig(**found, layer_norm_eps=1e-6)  # that of the original
    model = BlipVisionModel(config).float()
    fill(model, vision_tensors(state), path)
    return model.eval().requires_grad_(False)


def _text_model(state: Mapping[str, torch.Tensor], settings: Path, path: Path) -> Any:
    from transformers import BlipTextConfig, BlipTextModel

    names = {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings", "layer_norm_eps", "hidden_act"),
    }
    try:
        told = json.loads(settings.read_text())
        config = BlipTextConfig(
            **{name: told[name] for name in names},
            encoder_hidden_size=sizes(state)["hidden_size"],
            is_decoder=True,  # transformers' word for layers with cross attention
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScorerError(
            f"{settings} is no configuration of BLIP's text encoder: {error!r}"
        ) from error
    model = BlipTextModel(config, add_pooling_layer=False).float()
    fill(model, text_tensors(state), path)
    return model.eval().requires_grad_(False)


def _processor(size: int) -> Any:
    """Shortest edge to ``size``, centre crop, CLIP's colours: the original's preprocessing."""
    import transformers

    kind = "CLIPImageProcessorPil" if "backend" in pil_settings() else "CLIPImageProcessor"
    return getattr(transformers, kind)(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
