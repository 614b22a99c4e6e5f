"""Which optional packages are there, without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Import name -> name in messages and of the distribution, and how to get it.
OPTIONAL = {
    "transformer_engine": ("Transformer Engine", "install soar-mega[gpu]"),
    "apex": ("apex", "build NVIDIA's apex from source"),
    "nvidia.dali": ("DALI", "install soar-mega[dali]"),
    "wandb": ("wandb", "install soar-mega[wandb]"),
}


def find(name: str) -> list[str] | None:
    """Folders of a package, without importing it; None: it is not there."""
    parent, _, child = name.rpartition(".")
    if not parent:
        spec = importlib.util.find_spec(name)
        return None if spec is None else list(spec.submodule_search_locations or [])
    folders = [Path(folder) / child for folder in find(parent) or []]
    return [str(folder) for folder in folders if folder.is_dir()] or None


def is_there(name: str) -> bool:
    """Whether an optional package is installed. The apex of PyPI is something else entirely."""
    folders = find(name)
    if folders is None:
        return False
    return name != "apex" or any(
        (Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders
    )
