"""Tensors of the original BLIP, as ImageReward stores them, under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_VISION = "blip.visual_encoder."
_TEXT = "blip.text_encoder."
_TOP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HEAD_WIDTH = 64  # of every published vision transformer


def sizes(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Settings of ``BlipVisionConfig`` that the vision tensors imply.

    Raises:
        KeyError: The tensor they are read from is missing.
    """
    width, _, patch, _ = state[_VISION + "patch_embed.proj.weight"].shape
    places = state[_VISION + "pos_embed"].shape[1] - 1
    blocks = {key.split(".")[3] for key in state if key.startswith(_VISION + "blocks.")}
    return {
        "hidden_size": width,
        "intermediate_size": state[_VISION + "blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "patch_size": patch,
        "image_size": patch * round(places**0.5),
    }


def vision_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of ``BlipVisionModel`` in fp32.

    Raises:
        KeyError: A key that BLIP's vision transformer has not.
    """
    found = {}
    for key, value in state.items():
        name = key.removeprefix(_VISION)
        if name == key:
            continue
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            layer, _, part = rest.rpartition(".")
            name = f"encoder.layers.{number}.{_IN_BLOCK[layer]}.{part}"
        else:
            name = _TOP[name]
        found[name] = value.float()
    return found


def text_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of ``BlipTextModel`` in fp32: transformers kept BLIP's names."""
    return {
        key.removeprefix(_TEXT): value.float()
        for key, value in state.items()
        # The positions 0, 1, ... are a constant that older files store.
        if key.startswith(_TEXT) and not key.endswith("embeddings.position_ids")
    }
