"""A diffusers transformer as a checkpoint of ours that holds weights only, written piece by piece.

``model.init_from`` starts a run from it in any layout, as it would from the diffusers folder; the
checkpoint is for those who want their starting point verified, in one place and one format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from soar_mega.checkpoint import offline
from soar_mega.checkpoint.diffusers_map import POSITION, Entry, check_keys, mapping
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.hashing import HashAlgorithm
from soar_mega.checkpoint.raw_tensors import Array, cast, regions
from soar_mega.checkpoint.safetensors_files import SafetensorsFolder
from soar_mega.checkpoint.weight_sources import (
    ancestors,
    read_transformer_config,
    transformer_folder,
)
from soar_mega.model.config import MMDiTConfig


def convert_from_diffusers(
    source: Path | str,
    out: Path | str,
    dtype: str | None = None,
    algorithm: HashAlgorithm = "xxh3-128",
) -> Path:
    """Write a checkpoint with the weights of a diffusers folder.

    Args:
        source: A diffusers pipeline folder or a transformer alone; one file or shards.
        out: The checkpoint's folder; must be absent. It appears complete or not at all.
        dtype: Cast weights to this (a safetensors code); None keeps each one's. The position table
            is never cast.
        algorithm: Of the hashes.

    Returns:
        ``out``.

    Raises:
        CheckpointError: No diffusers folder; keys missing, unexpected or wrongly shaped (all are
            listed); ``out`` exists; weights of one of our stacked tensors have different dtypes.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    if out.exists():
        raise CheckpointError(f"{out} exists: choose another folder or remove it")
    config = MMDiTConfig.from_diffusers(read_transformer_config(source))
    files = SafetensorsFolder(transformer_folder(source))
    check_keys(config, files.shapes, str(files.folder))
    table = mapping(config)
    plan = {
        offline.MODEL + name: (entry.shape, _dtype_of(files, entry, dtype))
        for name, entry in table.items()
    }
    extra = {
        "step": 0,
        "weights_only": True,
        "model": {"pretrained": str(source), "transformer": config.to_diffusers()},
        "lineage": {"run": out.name, "parents": ancestors(source)},
    }

    def parts() -> Iterator[Array]:
        for name, entry in table.items():
            kept = plan[offline.MODEL + name][1]
            for key in entry.keys:
                for region in regions(entry.key_shape, files.dtypes[key]):
                    yield cast(files.read(key, region), kept)

    out.parent.mkdir(parents=True, exist_ok=True)
    offline.write(out, plan, parts(), extra, algorithm)
    return out


def _dtype_of(files: SafetensorsFolder, entry: Entry, dtype: str | None) -> str:
    found = {files.dtypes[key] for key in entry.keys}
    if dtype is not None and entry.name != POSITION:
        return dtype
    if len(found) > 1:
        raise CheckpointError(
            f"{', '.join(entry.keys)} are stored in different dtypes "
            f"({', '.join(sorted(found))}): choose one for all weights with --dtype"
        )
    return found.pop()
