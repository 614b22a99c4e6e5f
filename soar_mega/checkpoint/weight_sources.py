"""What weights may come from, a diffusers folder or a checkpoint, told by what lies there.

Nothing here imports torch: converters would wait for it longer than for a small model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from soar_mega import hub
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.folders import find

Weights = Literal["ema", "plain"]
LINEAGE = "soar_mega_lineage.json"  # beside an exported transformer's config


def kind_of(extra: Mapping[str, Any], asked: Weights) -> Weights:
    """Which weights to take from a checkpoint: one that holds weights only has no average of them.

    Args:
        extra: Its ``trainer.json``.
        asked: Which of a training state's.
    """
    return "plain" if extra.get("weights_only") else asked


def transformer_folder(folder: Path | str) -> Path:
    """Where the transformer of a diffusers folder lies.

    ``folder/transformer``, or ``folder`` itself if it holds a transformer alone.

    Raises:
        CheckpointError: Names the file that a diffusers model would have and this folder has not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: a diffusers model folder was expected")
    for candidate in (folder / "transformer", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise CheckpointError(
        f"{folder} is no diffusers model folder: "
        f"{folder / 'transformer' / 'config.json'} is missing"
    )


def read_transformer_config(folder: Path | str) -> dict[str, Any]:
    """The transformer's config, as diffusers wrote it.

    Raises:
        CheckpointError: No diffusers folder, or its transformer is of another class.
    """
    path = transformer_folder(folder) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if config.get("_class_name") != "SD3Transformer2DModel":
        raise CheckpointError(
            f"{path}: the class is {config.get('_class_name')}, expected SD3Transformer2DModel"
        )
    return config


def ancestors(folder: Path | str) -> list[dict[str, Any]]:
    """Where the weights of a diffusers folder come from, as far as is known, newest first.

    Raises:
        CheckpointError: An export of ours whose record is damaged.
    """
    path = transformer_folder(folder) / LINEAGE
    here: dict[str, Any] = {"pretrained": str(folder)}
    if not path.is_file():
        return [here]
    try:
        record = json.loads(path.read_text())
        return [{**here, **{k: v for k, v in record.items() if k != "parents"}}, *record["parents"]]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def find_weights(source: Path | str) -> Path | None:
    """The checkpoint that ``source`` names, or None if it is a diffusers folder.

    Raises:
        CheckpointError: It is neither.
    """
    source = Path(source)
    for marker in ("model_index.json", "config.json", "transformer"):
        if (source / marker).exists():
            read_transformer_config(source)
            return None
    if not source.exists() and (hub.parse(source) or hub.HUB_NAME.fullmatch(str(source))):
        raise CheckpointError(
            f"{source} does not exist: a folder was expected. To start from a model of the Hugging "
            "Face hub, name it in model.pretrained and its commit in model.revision, with "
            "model.init = pretrained"
        )
    return find(source)
