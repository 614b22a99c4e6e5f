"""The key layout in which SD3 models were first published, as one file; ComfyUI and others read it.

It differs from diffusers' in names, keeps query, key and value in one tensor (as ours are stacked),
and in the two modulations that have a shift and a scale only, the halves stand the other way round.
Names and shapes derive from the table in ``diffusers_map``. The truth is diffusers' own reader,
``convert_sd3_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

from dataclasses import dataclass

from soar_mega.checkpoint.diffusers_map import mapping
from soar_mega.model.config import MMDiTConfig

_PREFIX = "model.diffusion_model."
_OUTSIDE = {
    "patch_embed.position": "pos_embed",
    "patch_embed.projection": "x_embedder.proj",
    "condition.time_in": "t_embedder.mlp.0",
    "condition.time_out": "t_embedder.mlp.2",
    "condition.pooled_in": "y_embedder.mlp.0",
    "condition.pooled_out": "y_embedder.mlp.2",
    "text_embed.projection": "context_embedder",
    "head.modulation": "final_layer.adaLN_modulation.1",
    "head.projection": "final_layer.linear",
}
_STREAMS = {"image": "x_block", "text": "context_block"}
_IN_BLOCK = {
    "{ours}_modulation": "{theirs}.adaLN_modulation.1",
    "attention.{ours}.qkv": "{theirs}.attn.qkv",
    "attention.{ours}.norm_q": "{theirs}.attn.ln_q",
    "attention.{ours}.norm_k": "{theirs}.attn.ln_k",
    "attention.{ours}_out.projection": "{theirs}.attn.proj",
    "dual_attention.{ours}.qkv": "{theirs}.attn2.qkv",
    "dual_attention.{ours}.norm_q": "{theirs}.attn2.ln_q",
    "dual_attention.{ours}.norm_k": "{theirs}.attn2.ln_k",
    "dual_attention.{ours}_out.projection": "{theirs}.attn2.proj",
    "{ours}_mlp.up": "{theirs}.mlp.fc1",
    "{ours}_mlp.down": "{theirs}.mlp.fc2",
}
_BLOCK = {
    ours.format(ours=one, theirs=other): theirs.format(ours=one, theirs=other)
    for ours, theirs in _IN_BLOCK.items()
    for one, other in _STREAMS.items()
}


@dataclass(frozen=True)
class Original:
    """One tensor of the file.

    Attributes:
        name: Our tensor with the same elements.
        shape: In the file.
        swapped: Whether the halves of the first dimension change places.
    """

    name: str
    shape: tuple[int, ...]
    swapped: bool


def original_keys(config: MMDiTConfig) -> dict[str, Original]:
    """Key in the file -> what it holds, for the whole transformer."""
    found = {}
    for name, entry in mapping(config).items():
        shape = entry.key_shape
        if len(entry.keys) > 1:
            shape = (len(entry.keys) * shape[0], *shape[1:])
        swapped = name.startswith("head.modulation.") or (
            name.startswith(f"blocks.{config.num_layers - 1}.text_modulation.")
        )
        found[_PREFIX + _rename(name)] = Original(name, shape, swapped)
    return found


def _rename(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    owner, _, kind = name.rpartition(".")
    if not owner.startswith("blocks."):
        return f"{_OUTSIDE[owner]}.{kind}"
    _, number, inside = owner.split(".", 2)
    return f"joint_blocks.{number}.{_BLOCK[inside]}.{kind}"
