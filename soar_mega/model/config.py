"""The architecture of an MMDiT, in diffusers' words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class MMDiTConfig:
    """The fields of diffusers' ``SD3Transformer2DModel`` config, with its names and defaults."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"transformer config: caption_projection_dim is {self.caption_projection_dim}, but "
                f"num_attention_heads * attention_head_dim is {self.width}: they must be equal"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(
                f"transformer config: qk_norm is {self.qk_norm!r}; the family has null or rms_norm"
            )
        outside = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"transformer config: dual_attention_layers names {outside}, but there are "
                f"{self.num_layers} layers"
            )

    @property
    def width(self) -> int:
        """Width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    def is_dual(self, layer: int) -> bool:
        """Whether the block has a second, image-only attention (SD3.5-Medium)."""
        return layer in self.dual_attention_layers

    def is_last(self, layer: int) -> bool:
        """The last block has no text output."""
        return layer == self.num_layers - 1

    @staticmethod
    def from_diffusers(config: Mapping[str, Any]) -> MMDiTConfig:
        """From a diffusers ``transformer/config.json``.

        Raises:
            ValueError: The file describes another class, or an architecture outside the family.
        """
        kind = config.get("_class_name", "SD3Transformer2DModel")
        if kind != "SD3Transformer2DModel":
            raise ValueError(
                f"transformer config: the class is {kind}, expected SD3Transformer2DModel"
            )
        known = {field.name for field in fields(MMDiTConfig)}
        values = {key: value for key, value in config.items() if key in known}
        values["dual_attention_layers"] = tuple(values.get("dual_attention_layers") or ())
        if values.get("out_channels") is None:
            values["out_channels"] = values.get("in_channels", 16)
        return MMDiTConfig(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """Keyword arguments of ``SD3Transformer2DModel``."""
        return asdict(self)

    def check_tensor_parallel(self, tensor_size: int) -> None:
        """Refuse a tensor-parallel size that leaves a rank without a head or cuts unequal widths.

        Raises:
            ValueError: Names the setting, the value, the rule and the sizes that work.
        """
        if not self.can_cut(tensor_size):
            heads, works = self.num_attention_heads, range(1, self.num_attention_heads + 1)
            raise ValueError(
                f"parallel.tensor_model_parallel_size is {tensor_size}, but it must divide the "
                f"model's width {self.width}, and {-(-heads // tensor_size)} of its {heads} "
                "attention heads on each rank must leave no rank without: use one of "
                f"{[n for n in works if self.can_cut(n)]}"
            )

    def can_cut(self, tensor_size: int) -> bool:
        """Whether that many tensor-parallel ranks can share a layer."""
        heads = self.num_attention_heads
        return not self.width % tensor_size and -(-heads // tensor_size) * (tensor_size - 1) < heads
