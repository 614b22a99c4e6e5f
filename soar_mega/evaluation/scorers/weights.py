"""Where the weights of scorers lie, and reading them without running anything they contain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soar_mega import hub


class ScorerError(ValueError):
    """A scorer cannot be had or used; the message says why and what to do."""


@dataclass(frozen=True)
class Weights:
    """A folder that scorers load from.

    Attributes:
        name: How users name it, and its folder among others: that of its repository.
        repository: ``owner/name`` of the Hugging Face hub.
        needs: Shell-style patterns, each of which must match a file.
        fetch: Patterns of what is downloaded from the hub.
        url: Where to find the file where the hub has none; ``repository`` is empty then.
        terms: Its licence.
    """

    name: str
    repository: str
    needs: tuple[str, ...]
    fetch: tuple[str, ...] = ("*.json", "*.txt", "*.safetensors")
    url: str = ""
    terms: str = ""

    def missing(self, folder: Path) -> list[str]:
        """The patterns of ``needs`` that no file of ``folder`` matches."""
        return [pattern for pattern in self.needs if not any(folder.glob(pattern))]

    def advice(self, folder: str | Path) -> str:
        """How to get it into ``folder``."""
        if not self.repository:
            return f"Download {self.url} into the folder {folder}"
        page = f"https://huggingface.co/{self.repository}"
        files = " ".join(f"--include '{pattern}'" for pattern in self.fetch)
        return (
            f"Download it with\n  hf download {self.repository} --revision COMMIT {files} "
            f"--local-dir {folder}\nor name {self.repository}@COMMIT instead of a folder; COMMIT "
            f"is one that {page}/commits/main shows"
        )


CLIP_FILES = ("config.json", "*.safetensors", "preprocessor_config.json", "tokenizer.json")

CLIP_L = Weights(
    name="clip-vit-large-patch14",
    repository="openai/clip-vit-large-patch14",
    needs=CLIP_FILES,
    terms="MIT (code); the model card names research as its intended use",
)
# Tokenizer, preprocessing and sizes alone: the weights come from elsewhere.
CLIP_H_SETTINGS = Weights(
    name="CLIP-ViT-H-14-laion2B-s32B-b79K",
    repository="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    needs=("config.json", "preprocessor_config.json", "tokenizer.json"),
    fetch=("*.json", "*.txt"),
    terms="MIT",
)


def find(weights: Weights, location: str | Path, scorer: str) -> Path:
    """The folder of ``weights``, downloaded if it has to be.

    Args:
        weights: What is looked for.
        location: A folder, a file in it, or ``owner/name@COMMIT``.
        scorer: Who needs it, for messages.

    Raises:
        ScorerError: It is not there, or lacks files.
    """
    setting = f"{weights.name} (needed by the scorer {scorer})"
    try:
        folder = hub.resolve_files(
            location, setting=setting, needs=weights.needs, fetch=weights.fetch
        )
    except hub.HubError as error:
        raise ScorerError(str(error)) from error
    if folder.is_file():
        folder = folder.parent
    missing = weights.missing(folder)
    if missing:
        found = "lacks " + ", ".join(missing) if folder.is_dir() else "does not exist"
        raise ScorerError(
            f"the scorer {scorer} needs {weights.name}: the folder {folder} {found}. "
            f"{weights.advice(folder)}"
        )
    return folder


def find_all(
    needed: tuple[Weights, ...], locations: str | Path | Mapping[str, str | Path], scorer: str
) -> dict[str, Path]:
    """The folder of each of ``needed`` by name.

    Args:
        needed: What a scorer loads.
        locations: A folder that holds one folder of each name, or locations as of ``find`` by name;
            names that this scorer does not need are left to others.
        scorer: Who needs them, for messages.

    Raises:
        ScorerError: One is not told, not there, or lacks files.
    """
    folders = {}
    for weights in needed:
        if not isinstance(locations, Mapping):
            location: str | Path = Path(locations) / weights.name
        elif weights.name in locations:
            location = locations[weights.name]
        else:
            raise ScorerError(
                f"the scorer {scorer} needs {weights.name}, and its location is not told. "
                f"{weights.advice(weights.name)}"
            )
        folders[weights.name] = find(weights, location, scorer)
    return folders


def load_model(
    kind: Any, folder: Path, device: torch.device | str, *, unused: tuple[str, ...] = ()
) -> Any:
    """A transformers model in fp32 for inference.

    Args:
        kind: Its class.
        folder: One with config.json and safetensors files.
        device: Where it goes.
        unused: Ends of the names of parameters that may be missing, as no output depends on them.

    Raises:
        ScorerError: The folder cannot be read as such a model, or lacks tensors: transformers would
            fill them with random numbers and go on.
    """
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # of transformers, safetensors, JSON
        raise ScorerError(f"{folder} cannot be read as {kind.__name__}: {error}") from error
    # Not buffers, which are constants here that some releases store, nor names of tied parameters.
    own = {name for name, _ in model.named_parameters()}
    missing = own & set(report["missing_keys"])
    absent = sorted(name for name in missing if not name.endswith(unused))
    if absent:
        raise ScorerError(
            f"{folder} lacks {len(absent)} tensors of {kind.__name__}, such as {absent[0]}: "
            "download it again, and check that it is the model meant"
        )
    return model.to(device).eval().requires_grad_(False)


def load_part(kind: Any, folder: Path, **settings: Any) -> Any:
    """A tokenizer or processor of transformers.

    Raises:
        ScorerError: The folder cannot be read as one.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:
        raise ScorerError(f"{folder} cannot be read as {kind.__name__}: {error}") from error


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.pt`` or ``.pth`` file, read as data: no code in it runs.

    Returns:
        The file's dictionary, or that under its key ``state_dict``.

    Raises:
        ScorerError: It is damaged, holds more than tensors and plain values, or no state dict.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zipfile, pickle, torch
        raise ScorerError(
            f"{path} cannot be read as tensors alone ({error}). Only such files are accepted, as "
            "others may run code: download it again from where it is published"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ScorerError(f"{path} holds no state dict of tensors")
    return state


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load every tensor of ``module``, and leave none of ``state``.

    Raises:
        ScorerError: The file is of another model; the message names what differs.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ScorerError(f"{path} does not fit {type(module).__name__}: {error}") from error


def pil_settings() -> dict[str, Any]:
    """Makes an image processor resize with Pillow whether or not torchvision is there.

    The two differ by up to one grey level a pixel, which a score shows in its fourth digit.
    """
    import transformers

    # Releases that have both kinds call them so; older ones have a slow and a fast class.
    both = hasattr(transformers, "CLIPImageProcessorPil")
    return {"backend": "pil"} if both else {"use_fast": False}
