"""Models to draw with: what a path or a name on a command line means, and loading it.

What ``find_model`` reads is small, so whatever it refuses is refused before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from soar_mega import hub
from soar_mega.checkpoint.importer import load_weights
from soar_mega.checkpoint.store import identity, read_extra
from soar_mega.checkpoint.weight_sources import (
    LINEAGE,
    Weights,
    find_weights,
    kind_of,
    read_transformer_config,
    transformer_folder,
)
from soar_mega.data.encoded.fingerprint import component_fingerprint, encoder_fingerprint
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.model_folder import ModelFacts, check_folder, read_json
from soar_mega.model.config import MMDiTConfig
from soar_mega.parallel.mesh import Mesh
from soar_mega.sampling.build import build_stage, velocities_of
from soar_mega.sampling.generate import ModelFunction
from soar_mega.telemetry.flops import layer_costs

_T5_TOKENS = 256  # diffusers' own default


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        weights_from: The checkpoint, or the diffusers folder, of the transformer's weights.
        weights: Which of a checkpoint's.
        base: Diffusers folder of VAE, text encoders and scheduler.
        architecture: Of the transformer.
        facts: Of the base.
        max_sequence_length: T5's tokens: what a checkpoint was trained with, else diffusers'
            default or the tokenizer's limit.
        identity: Plain values that say which model this is, whatever the path: hashes, and of a
            checkpoint its run and step.
    """

    weights_from: Path
    weights: Weights
    base: Path
    architecture: MMDiTConfig
    facts: ModelFacts
    max_sequence_length: int
    identity: Mapping[str, Any] = field(repr=False)

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the transformer's config names."""
        return self.architecture.sample_size * self.facts.downsampling

    def check_size(self, height: int, width: int, setting: str) -> None:
        """Refuse a size that the model cannot draw.

        Raises:
            ValueError: Names the setting, the value and the rule.
        """
        step = self.facts.downsampling * self.architecture.patch_size
        most = step * self.architecture.pos_embed_max_size
        for side in (height, width):
            if side < step or side % step or side > most:
                raise ValueError(
                    f"{setting} = {side} must be a multiple of {step}, a patch of this model, and "
                    f"at most {most}, the side of its position table; its own is {self.resolution}"
                )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture."""
        factor = self.facts.downsampling
        return self.architecture.in_channels, height // factor, width // factor


def find_model(given: str | Path, weights: Weights, *, setting: str = "MODEL") -> ModelSource:
    """What a person means by a path or a hub name; a hub model is downloaded.

    Args:
        given: A run folder (its newest checkpoint), a checkpoint, a diffusers folder, or
            ``owner/name@COMMIT``.
        weights: Which of a checkpoint's; a diffusers folder has one kind.
        setting: Who names it, for messages.

    Raises:
        ValueError: It is none of these, or damaged.
    """
    source = hub.resolve(given, setting=setting)
    checkpoint = find_weights(source)
    if checkpoint is None:
        base, record = source, dict[str, Any](transformer=read_transformer_config(source))
    else:
        extra = read_extra(checkpoint)
        try:
            record = extra["model"]
            named = str(record["pretrained"])
            record["transformer"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{checkpoint} does not name its model: {error!r} is missing"
            ) from error
        base = hub.resolve(named, setting=f"model.pretrained of {checkpoint}")
    check_folder(base, setting=setting if checkpoint is None else "its model.pretrained")
    if checkpoint is None:
        identified = _identify_folder(source)
    else:
        weights = kind_of(extra, weights)
        lineage = extra.get("lineage", {})
        identified = {
            "checkpoint": identity(checkpoint),
            "weights": weights,
            "step": extra.get("step", lineage.get("step")),
            "run": lineage.get("run"),
        }
    length = record.get("max_sequence_length")
    return ModelSource(
        weights_from=source if checkpoint is None else checkpoint,
        weights=weights,
        base=base,
        architecture=MMDiTConfig.from_diffusers(record["transformer"]),
        facts=ModelFacts.read(base),
        max_sequence_length=_t5_tokens(base) if length is None else int(length),
        identity={**identified, "encoders": _identify_encoders(base)},
    )


def _identify_folder(source: Path) -> dict[str, Any]:
    transformer = transformer_folder(source)
    found: dict[str, Any] = {
        "transformer": f"sha256:{component_fingerprint(transformer, f'{transformer}: ')}"
    }
    lineage = transformer / LINEAGE
    if lineage.is_file():
        record = read_json(lineage, f"{source}: ")
        found |= {key: record[key] for key in ("weights", "step", "run") if key in record}
        found["exported_from"] = record.get("hash")
    return found


def _identify_encoders(base: Path) -> str:
    """One hash of the VAE, the text encoders, the tokenizers and the scheduler's settings."""
    parts: dict[str, Any] = dict(encoder_fingerprint(base))
    scheduler = read_json(base / "scheduler" / "scheduler_config.json", f"{base}: ")
    scheduler.pop("_diffusers_version", None)
    text = json.dumps({**parts, "scheduler": scheduler}, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _t5_tokens(base: Path) -> int:
    config = base / "tokenizer_3" / "tokenizer_config.json"
    # A T5 tokenizer may have been made for less than diffusers' default.
    limit = read_json(config, f"{base}: ").get("model_max_length") if config.is_file() else None
    return min(_T5_TOKENS, int(limit)) if isinstance(limit, int | float) else _T5_TOKENS


def load_transformer(source: ModelSource, mesh: Mesh, dtype: torch.dtype) -> ModelFunction:
    """Its velocities, the model spread over the tensor and pipeline ranks; every rank calls it.

    Args:
        source: The same on every rank.
        mesh: Where this process stands.
        dtype: Of the weights.

    Raises:
        ValueError: A file is damaged, or the mesh does not fit the architecture.
    """
    architecture, facts = source.architecture, source.facts
    tokens = (architecture.sample_size // architecture.patch_size) ** 2
    costs = layer_costs(architecture, tokens, facts.text_tokens(source.max_sequence_length))
    stage = build_stage(architecture, mesh, dtype, costs)
    load_weights(source.weights_from, [stage], mesh, source.weights)
    return velocities_of(stage, mesh)


class LastEncoders:
    """Encoders of the model at hand, kept for the next one: checkpoints of a base share them.

    Args:
        device: Where to compute.
        dtype: Of the text encoders.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._base: Path | None = None
        self._encoders: FrozenEncoders | None = None

    def of(self, source: ModelSource) -> FrozenEncoders:
        """Those of the model's base.

        Raises:
            ValueError: A part does not load.
        """
        if self._encoders is None or source.base != self._base:
            self._encoders = None  # before others come: published ones fill half a GPU
            self._encoders = FrozenEncoders.load(
                source.base, device=self._device, dtype=self._dtype
            )
            self._base = source.base
        return self._encoders


def compute_dtype(device: torch.device) -> torch.dtype:
    """What models that only draw compute in: bf16 on CUDA, fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
