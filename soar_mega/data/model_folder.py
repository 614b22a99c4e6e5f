"""A diffusers SD3 folder as its json files describe it: nothing heavy is loaded.

Legend: B samples, H/W pixels or latent cells, C channels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

_CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
_REQUIRED = (
    "transformer",
    "scheduler",
    "vae",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
)
_OPTIONAL = ("text_encoder_3", "tokenizer_3")
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")


class FolderError(ValueError):
    """A folder that is no usable diffusers SD3 model; the message names what is missing."""


def check_folder(folder: str | Path, *, setting: str = "model.pretrained") -> dict[str, str]:
    """Look at file names and json only; nothing heavy is loaded.

    Returns:
        The class name of each present component, by subfolder.

    Raises:
        FolderError: No such folder, no ``model_index.json``, another pipeline, or a component that
            lacks its subfolder, config or (VAE and text encoders) safetensors weights.
    """
    root = Path(folder).expanduser()
    lead = f"{setting}={str(folder)!r}: "
    fix = " Give a folder that StableDiffusion3Pipeline.save_pretrained wrote."
    if not root.is_dir():
        raise FolderError(f"{lead}no such folder (working directory {Path.cwd()}).{fix}")
    if not (root / "model_index.json").is_file():
        raise FolderError(f"{lead}no diffusers model: it has no model_index.json.{fix}")
    record = read_json(root / "model_index.json", lead)
    name = str(record.get("_class_name"))
    if not name.startswith("StableDiffusion3"):
        raise FolderError(
            f"{lead}model_index.json names the pipeline {name!r}, not StableDiffusion3.{fix}"
        )
    classes: dict[str, str] = {}
    missing: list[str] = []
    for part in _REQUIRED + _OPTIONAL:
        entry = record.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            if part in _REQUIRED:
                missing.append(f"{part} (not in model_index.json)")
            continue
        classes[part] = entry[1]
        config = _config_of(part)
        if not (root / part).is_dir():
            missing.append(f"{part}/")
        elif not (root / part / config).is_file():
            missing.append(f"{part}/{config}")
        elif part in ENCODERS and not any((root / part).glob("*.safetensors")):
            missing.append(f"{part}/*.safetensors")
    if ("text_encoder_3" in classes) != ("tokenizer_3" in classes):
        missing.append("one of text_encoder_3 and tokenizer_3 (both or neither must be there)")
    if missing:
        raise FolderError(f"{lead}incomplete diffusers model: missing {', '.join(missing)}.{fix}")
    return classes


def _config_of(part: str) -> str:
    return _CONFIGS.get(part.split("_")[0], "config.json")


def read_json(path: Path, lead: str) -> dict[str, Any]:
    """The object in a json file; ``lead`` starts the message of the ``FolderError``."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FolderError(
            f"{lead}{path.parent.name}/{path.name} cannot be read: {error}"
        ) from error
    if not isinstance(record, dict):
        raise FolderError(f"{lead}{path.parent.name}/{path.name} is no json object")
    return record


@dataclass
class ModelFacts:
    """What training must know of the frozen models, whether it runs them or not.

    Attributes:
        latent_channels: Of the VAE's latents.
        downsampling: Pixels a latent cell is wide and high.
        scaling_factor: See ``normalise``.
        shift_factor: See ``normalise``.
        shift: The scheduler's.
        clip_tokens: Tokens of each CLIP.
        clip_width: Width of both CLIPs' hidden states together.
        text_width: Width E of the transformer's text input; CLIP's is filled up to it with zeros.
        pooled_width: Width of both CLIPs' pooled outputs together.
        has_t5: Without, zeros stand for T5's hidden states.
    """

    latent_channels: int
    downsampling: int
    scaling_factor: float
    shift_factor: float
    shift: float
    clip_tokens: int
    clip_width: int
    text_width: int
    pooled_width: int
    has_t5: bool

    @staticmethod
    def read(folder: str | Path) -> ModelFacts:
        """Read them from a diffusers folder.

        Raises:
            FolderError: See ``check_folder``; or a config lacks one of them.
        """
        classes = check_folder(folder)
        root = Path(folder).expanduser()
        lead = f"model.pretrained={str(folder)!r}: "

        def value(part: str, key: str, default: Any = None) -> Any:
            path = root / part / _config_of(part)
            found = read_json(path, lead).get(key)
            if found is None and default is None:
                raise FolderError(f"{lead}{part}/{path.name} has no {key!r}. Take a whole folder.")
            return default if found is None else found

        clips = ("text_encoder", "text_encoder_2")
        return ModelFacts(
            latent_channels=int(value("vae", "latent_channels")),
            downsampling=2 ** (len(value("vae", "block_out_channels")) - 1),
            scaling_factor=float(value("vae", "scaling_factor")),
            shift_factor=float(value("vae", "shift_factor", 0.0)),
            shift=float(value("scheduler", "shift", 1.0)),
            # As the pipeline does: the first tokenizer's length counts for both CLIPs.
            clip_tokens=int(value("tokenizer", "model_max_length")),
            clip_width=sum(int(value(clip, "hidden_size")) for clip in clips),
            text_width=int(value("transformer", "joint_attention_dim")),
            pooled_width=sum(int(value(clip, "projection_dim")) for clip in clips),
            has_t5="text_encoder_3" in classes,
        )

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square picture.

        Raises:
            ValueError: The VAE's downsampling does not divide ``resolution``.
        """
        if resolution % self.downsampling:
            above = -(-resolution // self.downsampling) * self.downsampling
            raise ValueError(
                f"data.resolution={resolution}: must be a multiple of the VAE's downsampling "
                f"{self.downsampling}; the next is {above}"
            )
        side = resolution // self.downsampling
        return self.latent_channels, side, side

    def text_tokens(self, max_sequence_length: int) -> int:
        """Tokens of an encoded prompt: those of a CLIP and of T5, one after the other."""
        return self.clip_tokens + max_sequence_length

    def normalise(self, raw_BCHW: Tensor) -> Tensor:
        """Latents as the transformer sees them: ``(z - shift_factor) * scaling_factor``."""
        return (raw_BCHW - self.shift_factor) * self.scaling_factor
