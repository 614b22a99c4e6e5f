"""Tensors of an open_clip checkpoint under the names of transformers' ``CLIPModel``.

open_clip stores query, key and value weights as one tensor, and its projections transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

_TOP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_BLOCKS = {
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LEFT_OUT = {"attn_mask"}  # a constant that some versions stored


def to_transformers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor in fp32 under its new name.

    Raises:
        KeyError: A key that no open_clip CLIP of this kind has.
    """
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key not in _LEFT_OUT:
            found.update(_renamed(key, value.float()))
    return found


def _renamed(key: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if key in _TOP:
        yield _TOP[key], value
        return
    if key in _TRANSPOSED:
        yield _TRANSPOSED[key], value.T.contiguous()
        return
    for prefix, new in _BLOCKS.items():
        if key.startswith(prefix):
            number, _, rest = key.removeprefix(prefix).partition(".")
            layer, _, part = rest.rpartition(".")
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                part = rest.removeprefix("attn.in_proj_")
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    yield f"{new}{number}.self_attn.{name}_proj.{part}", third.contiguous()
                return
            if layer in _IN_BLOCK:
                yield f"{new}{number}.{_IN_BLOCK[layer]}.{part}", value
                return
    raise KeyError(key)
