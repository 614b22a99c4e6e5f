"""The README.md of an exported model: where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soar_mega.checkpoint.manifest import identity


def model_card(
    extra: Mapping[str, Any],
    checkpoint: Path,
    base: Path | str,
    weights: str,
    transformer_only: bool,
) -> str:
    """Markdown with the lineage recorded in a checkpoint.

    Args:
        extra: The checkpoint's ``trainer.json``.
        checkpoint: Its folder.
        base: The diffusers folder or hub model that the rest of the pipeline comes from.
        weights: ``ema`` or ``plain``.
        transformer_only: Whether the folder holds the transformer alone.
    """
    facts = {
        "weights": weights,
        "checkpoint": checkpoint.name,
        "trained from": extra["model"]["pretrained"],
        "max_sequence_length (T5 tokens)": extra["model"].get("max_sequence_length"),
        **({} if transformer_only else {"rest of the pipeline": str(base)}),
        **{k: v for k, v in extra.get("lineage", {}).items() if k != "parents"},
    }
    rows = _rows(facts)
    ancestors = extra.get("lineage", {}).get("parents", [])
    for number, ancestor in enumerate(ancestors, 1):
        rows += [f"| **ancestor {number}** | |", *_rows(ancestor)]
    kind = "SD3Transformer2DModel" if transformer_only else "StableDiffusion3Pipeline"
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "---",
            "",
            f"# {extra.get('lineage', {}).get('run', checkpoint.parent.parent.name)}",
            "",
            "Exported by soar_mega.",
            "",
            "```python",
            f"from diffusers import {kind}",
            "",
            f'model = {kind}.from_pretrained("this folder")',
            "```",
            "",
            "| lineage | |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def lineage_record(extra: Mapping[str, Any], checkpoint: Path, weights: str) -> dict[str, Any]:
    """What an export carries, so that a run that starts from it knows all its ancestors.

    Args:
        extra: The checkpoint's ``trainer.json``.
        checkpoint: Its folder.
        weights: ``ema`` or ``plain``.
    """
    record = {"parents": [], **extra.get("lineage", {})}
    here = {"weights": weights, "checkpoint": checkpoint.name, "hash": identity(checkpoint)}
    return {**record, **here}


def _rows(facts: Mapping[str, Any]) -> list[str]:
    return [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if value]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
