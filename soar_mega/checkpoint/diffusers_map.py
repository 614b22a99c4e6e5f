"""One table between our parameters and the keys of diffusers' ``SD3Transformer2DModel``.

Every entry is one of our global tensors and the diffusers tensors it holds: one tensor, copied or
reshaped (the patch convolution is a linear layer here), or three stacked (query, key, value). Both
directions read the same entry.

Legend for shapes: D width, E text embedding width, V pooled width, C/P latent channels, patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from soar_mega.checkpoint.errors import CheckpointError, listing
from soar_mega.checkpoint.raw_tensors import Array
from soar_mega.model.config import MMDiTConfig

POSITION = "patch_embed.position"
_TIMESTEP_CHANNELS = 256

Region = tuple[slice, ...]
Source = Callable[[str, Region | None], Array]


@dataclass(frozen=True)
class Entry:
    """One of our global tensors and what it is made of.

    Attributes:
        name: Our parameter (or buffer), by its global name.
        shape: Its global shape; ``(3, ...)`` where three tensors are stacked.
        keys: The diffusers keys, in stacking order.
        key_shape: Shape of each of them.
    """

    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    key_shape: tuple[int, ...]

    def to_ours(self, source: Source, region: Region | None = None) -> Array:
        """Our tensor, or the slice ``region`` of it, reading no more than that where shapes allow.

        Args:
            source: ``source(key, region)`` gives a diffusers tensor or a slice of it.
            region: One slice (with start and stop) per dimension of ``shape``; None: everything.
        """
        region = region or tuple(slice(0, size) for size in self.shape)
        if len(self.keys) > 1:
            first, *rest = region
            return np.stack([source(key, tuple(rest)) for key in self.keys[first]])
        if self.shape == self.key_shape:
            return source(self.keys[0], region)
        return source(self.keys[0], None).reshape(self.shape)[region]

    def to_diffusers(self, tensor: Array) -> Iterator[tuple[str, Array]]:
        """The diffusers tensors that our global ``tensor`` holds, as views where possible."""
        parts = tensor if len(self.keys) > 1 else (tensor,)
        for key, part in zip(self.keys, parts, strict=True):
            yield key, part.reshape(self.key_shape)


def mapping(config: MMDiTConfig) -> dict[str, Entry]:
    """Our name -> entry, for every parameter and stored buffer of the model."""
    D = config.width
    patch = config.in_channels * config.patch_size**2
    table = _Table()
    table.add(POSITION, "pos_embed.pos_embed", (1, config.pos_embed_max_size**2, D))
    convolution = (D, config.in_channels, config.patch_size, config.patch_size)
    table.add("patch_embed.projection.weight", "pos_embed.proj.weight", (D, patch), convolution)
    table.add("patch_embed.projection.bias", "pos_embed.proj.bias", (D,))
    embedder = "time_text_embed.timestep_embedder"
    table.linear("condition.time_in", f"{embedder}.linear_1", D, _TIMESTEP_CHANNELS)
    table.linear("condition.time_out", f"{embedder}.linear_2", D, D)
    embedder = "time_text_embed.text_embedder"
    table.linear("condition.pooled_in", f"{embedder}.linear_1", D, config.pooled_projection_dim)
    table.linear("condition.pooled_out", f"{embedder}.linear_2", D, D)
    table.linear("text_embed.projection", "context_embedder", D, config.joint_attention_dim)
    for layer in range(config.num_layers):
        _block(table, config, layer)
    table.linear("head.modulation", "norm_out.linear", 2 * D, D)
    table.linear("head.projection", "proj_out", config.patch_size**2 * config.out_channels, D)
    return table.entries


def _block(table: _Table, config: MMDiTConfig, layer: int) -> None:
    ours, theirs = f"blocks.{layer}", f"transformer_blocks.{layer}"
    D, last, dual = config.width, config.is_last(layer), config.is_dual(layer)
    norms = config.attention_head_dim if config.qk_norm else None
    table.linear(f"{ours}.image_modulation", f"{theirs}.norm1.linear", (9 if dual else 6) * D, D)
    text_rows = (2 if last else 6) * D
    table.linear(f"{ours}.text_modulation", f"{theirs}.norm1_context.linear", text_rows, D)
    joint = f"{theirs}.attn"
    image = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
    table.stream(f"{ours}.attention.image", joint, image, D, norms)
    text = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
    table.stream(f"{ours}.attention.text", joint, text, D, norms)
    table.linear(f"{ours}.attention.image_out.projection", f"{joint}.to_out.0", D, D)
    if not last:
        table.linear(f"{ours}.attention.text_out.projection", f"{joint}.to_add_out", D, D)
    if dual:
        second = f"{theirs}.attn2"
        table.stream(f"{ours}.dual_attention.image", second, image, D, norms)
        table.linear(f"{ours}.dual_attention.image_out.projection", f"{second}.to_out.0", D, D)
    table.linear(f"{ours}.image_mlp.up", f"{theirs}.ff.net.0.proj", 4 * D, D)
    table.linear(f"{ours}.image_mlp.down", f"{theirs}.ff.net.2", D, 4 * D)
    if not last:
        table.linear(f"{ours}.text_mlp.up", f"{theirs}.ff_context.net.0.proj", 4 * D, D)
        table.linear(f"{ours}.text_mlp.down", f"{theirs}.ff_context.net.2", D, 4 * D)


class _Table:
    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def add(
        self,
        name: str,
        key: str,
        shape: tuple[int, ...],
        key_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.entries[name] = Entry(name, shape, (key,), key_shape or shape)

    def linear(self, name: str, key: str, outputs: int, inputs: int) -> None:
        self.add(f"{name}.weight", f"{key}.weight", (outputs, inputs))
        self.add(f"{name}.bias", f"{key}.bias", (outputs,))

    def stream(
        self, name: str, prefix: str, keys: tuple[str, ...], D: int, norms: int | None
    ) -> None:
        """Query, key and value of one stream, stacked, and their norms (of width ``norms``)."""
        for kind, shape in (("weight", (D, D)), ("bias", (D,))):
            stacked = tuple(f"{prefix}.{key}.{kind}" for key in keys[:3])
            full = f"{name}.qkv.{kind}"
            self.entries[full] = Entry(full, (3, *shape), stacked, shape)
        if norms is not None:
            self.add(f"{name}.norm_q.weight", f"{prefix}.{keys[3]}.weight", (norms,))
            self.add(f"{name}.norm_k.weight", f"{prefix}.{keys[4]}.weight", (norms,))


def diffusers_shapes(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Diffusers key -> shape, for the whole model."""
    return {key: entry.key_shape for entry in mapping(config).values() for key in entry.keys}


def check_keys(config: MMDiTConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare a file's tensors with what the config asks for.

    Args:
        config: The architecture.
        found: Key -> shape in the files.
        where: What to call them in the message.

    Raises:
        CheckpointError: Lists all missing, unexpected and wrongly shaped keys.
    """
    wanted = diffusers_shapes(config)
    wrong = [
        f"{key}: {tuple(found[key])}, expected {shape}"
        for key, shape in wanted.items()
        if key in found and tuple(found[key]) != shape
    ]
    problems = (
        listing("missing keys", wanted.keys() - found.keys())
        + listing("unexpected keys", found.keys() - wanted.keys())
        + listing("wrong shapes", wrong)
    )
    if problems:
        raise CheckpointError(
            f"the weights in {where} do not match the transformer config: {problems}"
        )
