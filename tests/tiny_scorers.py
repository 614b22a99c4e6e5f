"""Tiny models of the real classes with random weights, in the folders that scorers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from soar_mega.data.tiny.text import make_clip_tokenizer

SIZE = 32  # of pictures that no processor resizes
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def noise(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """A picture in which every pixel differs."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def normalised(picture: Image.Image) -> torch.Tensor:
    """(1, 3, H, W): CLIP's preprocessing of a picture that has its size already."""
    pixels = (np.asarray(picture, np.float32) / 255 - MEAN) / DEVIATION
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def clip_folder(folder: Path, *, layers: int = 2, act: str = "quick_gelu", seed: int = 0) -> Any:
    """A ``CLIPModel`` with tokenizer and processor, also saved into ``folder``."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tokenizer = make_clip_tokenizer(["a photo of a red car", "two cats and a dog"] * 3, 16)
    common = {"num_hidden_layers": layers, "num_attention_heads": 2, "hidden_act": act}
    config = CLIPConfig(
        text_config={
            **common,
            "hidden_size": 16,
            "intermediate_size": 32,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        vision_config={
            **common,
            "hidden_size": 24,
            "intermediate_size": 48,
            "image_size": SIZE,
            "patch_size": 8,
        },
        projection_dim=20,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():  # fresh weights are so small that all pictures look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.logit_scale.fill_(np.log(100.0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sides = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=sides).save_pretrained(folder)
    return model


def head_state(width: int, prefix: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """The five linear layers of a LAION or ImageReward head on ``width`` numbers."""
    generator = torch.Generator().manual_seed(seed)
    widths, state = [width, 12, 10, 8, 6, 1], {}
    for place, number in enumerate((0, 2, 4, 6, 7)):
        shape = (widths[place + 1], widths[place])
        state[f"{prefix}{number}.weight"] = torch.randn(shape, generator=generator)
        state[f"{prefix}{number}.bias"] = torch.randn(shape[0], generator=generator)
    return state


def head_value(state: dict[str, torch.Tensor], prefix: str, x: torch.Tensor) -> float:
    """What those layers make of ``x``."""
    for number in (0, 2, 4, 6, 7):
        x = state[f"{prefix}{number}.weight"] @ x + state[f"{prefix}{number}.bias"]
    return float(x)


def detector_folder(folder: Path, *, classes: int = 80) -> Any:
    """A ``Mask2FormerForUniversalSegmentation`` that calls everything a cat (class 15)."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    from transformers import Mask2FormerImageProcessor as Processor

    torch.manual_seed(2)
    config = Mask2FormerConfig(
        backbone_config={
            "model_type": "swin",
            "image_size": 64,
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        feature_size=32,  # the least that its 32 groups allow
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=4,
        num_labels=classes,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.zero_()
        model.class_predictor.bias[15] = 12.0
    model.save_pretrained(folder)
    # As published, though for another purpose: the scorer sets its own size.
    size = {"height": 384, "width": 384}
    Processor(size=size, ignore_index=255).save_pretrained(folder)
    return model


def reader_folder(folder: Path) -> Any:
    """A ``GotOcr2ForConditionalGeneration`` with processor and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GotOcr2Config,
        GotOcr2ForConditionalGeneration,
        GotOcr2ImageProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(3)
    vocab = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>", "<|endoftext|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=words[:-1],
    )
    config = GotOcr2Config(
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 128,
            "window_size": 4,
            "global_attn_indexes": [0],
            "mlp_dim": 16,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
    )
    model = GotOcr2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GotOcr2ImageProcessor(size={"height": 128, "width": 128}).save_pretrained(folder)
    return model
