"""What both sides compute: model, objective, sizes, number format, optimizer or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint.weight_sources import read_transformer_config
from soar_mega.config import FlowMatchingConfig, SoarConfig
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import parameter_layouts
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import MicroBatch
from soar_mega.telemetry.flops import forward_flops, training_factor
from soar_mega.training.benchmark import made_up_microbatch
from soar_mega.training.benchmark_step.variants import Variant

# Of the sigma schedule; the whole family has it.
SHIFT = 3.0
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Samples of a step where none are given: those of the configurations in configs/.
_MICRO_BATCH = {
    ("sd35_medium", "sft"): 8,
    ("sd35_medium", "soar"): 4,
    ("sd35_large", "sft"): 2,
    ("sd35_large", "soar"): 1,
}
# Weights and gradients bf16, both again fp32 for AdamW, two moments: the reference, which has more.
_STATE_BYTES = 2 + 2 + 4 + 4 + 8
# The rest is for activations.
_STATE_SHARE = 0.6


@dataclass(frozen=True)
class Load:
    """What is computed; the variants say how.

    Attributes:
        name: Of the architecture, in tables.
        architecture: Of the model.
        objective: ``sft`` (flow matching) or ``soar`` with one path.
        device: ``cuda`` or ``cpu``.
        dtype: ``bf16`` or ``fp32``.
        latent_size: Height and width of the latents; 64 for pictures of 512 px.
        text_tokens: CLIP's and T5's together.
        trajectory_length: Auxiliary states N.
        optimizer: Whether a step has AdamW with fp32 master weights and clipping, on both sides.
        threads: Of torch on the CPU; None: torch's own choice.
    """

    name: str
    architecture: MMDiTConfig
    objective: Literal["sft", "soar"]
    device: str = "cuda"
    dtype: Literal["bf16", "fp32"] = "bf16"
    latent_size: int = 64
    text_tokens: int = 154
    trajectory_length: int = 6
    optimizer: bool = True
    threads: int | None = None

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Load:
        """The inverse of ``dataclasses.asdict``, by way of JSON or not."""
        shape = dict(record["architecture"])
        shape["dual_attention_layers"] = tuple(shape["dual_attention_layers"])
        return Load(**{**record, "architecture": MMDiTConfig(**shape)})

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def settings(self, variant: Variant) -> FlowMatchingConfig | SoarConfig:
        """The objective's, without prompt dropout, which the reference has by whole batches."""
        if self.objective == "sft":
            return FlowMatchingConfig(name="flow_matching", cond_dropout_rate=0.0)
        return SoarConfig(
            name="soar",
            cond_dropout_rate=0.0,
            trajectory_length=self.trajectory_length,
            aux_group_size=variant.aux_group_size,
            reuse_base_forward=variant.side == "ours",
        )

    def factor(self, variant: Variant) -> int:
        """k, the forward equivalents of a sample: recomputation never counts."""
        return training_factor(self.settings(variant))

    def forward_flops(self) -> int:
        """F, of one forward of one sample."""
        image = (self.latent_size // self.architecture.patch_size) ** 2
        return forward_flops(self.architecture, image, self.text_tokens)

    def parameters(self) -> int:
        """Of the model."""
        return _count_parameters(self.architecture)

    def microbatch(self, variant: Variant) -> MicroBatch:
        """Made-up encoded data on the device, the same for every variant."""
        return made_up_microbatch(
            self.architecture,
            variant.micro_batch_size,
            self.latent_size,
            self.text_tokens,
            self.device,
            self.torch_dtype,
        )

    def default_micro_batch(self) -> int:
        """Samples of a step where none are given."""
        return _MICRO_BATCH.get((self.name, self.objective), 4)


@cache
def _count_parameters(architecture: MMDiTConfig) -> int:
    stage = MMDiTStage(architecture, Mesh.single("meta"), TorchBackend())
    shapes = (layout.global_shape for layout in parameter_layouts(stage).values())
    return sum(torch.Size(shape).numel() for shape in shapes)


def published(folder: Path, objective: Literal["sft", "soar"], **more: Any) -> Load:
    """The load of an architecture of ``configs/architectures`` (or any diffusers folder)."""
    architecture = MMDiTConfig.from_diffusers(read_transformer_config(folder))
    return Load(folder.resolve().name, architecture, objective, **more)


def with_optimizer_if_it_fits(load: Load, memory_bytes: int) -> Load:
    """AdamW on both sides where its state leaves room for activations, else on none.

    At 20 bytes a parameter SD3.5-Medium's is 45 GB and SD3.5-Large's 161 GB, more than one device
    has; a real run shards it.
    """
    fits = load.parameters() * _STATE_BYTES <= _STATE_SHARE * memory_bytes
    return replace(load, optimizer=fits)
