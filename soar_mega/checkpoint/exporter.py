"""A checkpoint of ours as a diffusers folder, written piece by piece.

The transformer's weights come from the checkpoint, everything else of the pipeline (VAE, text
encoders, tokenizers, scheduler) from the diffusers folder the run started with.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from soar_mega import hub
from soar_mega.checkpoint import offline
from soar_mega.checkpoint.diffusers_map import POSITION, Entry, mapping
from soar_mega.checkpoint.errors import CheckpointError, listing
from soar_mega.checkpoint.folders import find
from soar_mega.checkpoint.manifest import verify
from soar_mega.checkpoint.model_card import lineage_record, model_card
from soar_mega.checkpoint.original_map import Original, original_keys
from soar_mega.checkpoint.raw_tensors import Array, cast, read_ahead, regions
from soar_mega.checkpoint.safetensors_files import MAX_SHARD_BYTES, StreamWriter
from soar_mega.checkpoint.synced import sync_folder, write_json
from soar_mega.checkpoint.weight_sources import LINEAGE, Weights, kind_of
from soar_mega.model.config import MMDiTConfig


def export(
    checkpoint: Path | str,
    out: Path | str,
    base: Path | str | None = None,
    weights: Weights = "ema",
    transformer_only: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a folder that ``StableDiffusion3Pipeline.from_pretrained`` opens.

    Args:
        checkpoint: A checkpoint, or a run folder (its newest checkpoint).
        out: Where to; must be absent or empty. It appears complete or not at all.
        base: Diffusers folder, or ``owner/name@COMMIT`` of the hub, for the rest of the pipeline;
            None: the one the checkpoint names.
        weights: ``ema`` or ``plain``.
        transformer_only: Write the transformer alone, right into ``out``, for
            ``SD3Transformer2DModel.from_pretrained``.
        dtype: Cast weights to this (a safetensors code); None keeps the checkpoint's (fp32). The
            position table is cast only where no bit is lost.
        max_shard_bytes: Largest safetensors file.

    Returns:
        ``out``.

    Raises:
        CheckpointError: ``out`` is not empty; the checkpoint is damaged or lacks tensors or facts;
            the base is no complete pipeline folder. Nothing is left behind.
    """
    checkpoint, out = find(checkpoint), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty: choose another folder or remove it")
    with _verifying(checkpoint) as whole:
        state, extra, weights = _open(checkpoint, weights)
        config = _transformer_config(extra, checkpoint)
        sources = _sources(state, config, weights, checkpoint)
        base = base or str(extra["model"]["pretrained"])
        parts = [] if transformer_only else _pipeline_parts(_resolve(base))

        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        transformer = temporary if transformer_only else temporary / "transformer"
        try:
            transformer.mkdir(parents=True)
            for part in parts:
                copy = shutil.copytree if part.is_dir() else shutil.copyfile
                copy(part, temporary / part.name)
            _write_config(transformer / "config.json", config)
            _write_weights(transformer, state, sources, dtype, max_shard_bytes)
            card = model_card(extra, checkpoint, base, weights, transformer_only)
            (temporary / "README.md").write_text(card)
            write_json(transformer / LINEAGE, lineage_record(extra, checkpoint, weights))
            whole()
            temporary.rename(out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def _resolve(base: Path | str) -> Path:
    try:
        return hub.resolve(base, setting="the base")
    except hub.HubError as error:
        raise CheckpointError(str(error)) from error


def export_single_file(
    checkpoint: Path | str,
    out: Path | str,
    weights: Weights = "ema",
    dtype: str | None = None,
) -> Path:
    """Write the transformer as one file in the key layout SD3 was first published in.

    Args:
        checkpoint, weights, dtype: See ``export``.
        out: The ``.safetensors`` file; must be absent. It appears complete or not at all.

    Returns:
        ``out``.

    Raises:
        CheckpointError: As ``export``.
    """
    checkpoint, out = find(checkpoint), Path(out).resolve()
    if out.exists() or out.suffix != ".safetensors":
        raise CheckpointError(f"{out} must be the name of a .safetensors file that does not exist")
    with _verifying(checkpoint) as whole:
        state, extra, weights = _open(checkpoint, weights)
        config = _transformer_config(extra, checkpoint)
        sources = _sources(state, config, weights, checkpoint)
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_single_file(temporary, state, sources, original_keys(config), dtype)
            whole()
            temporary.rename(out)
            sync_folder(out.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return out


def _write_single_file(
    path: Path,
    state: offline.StateReader,
    sources: list[tuple[str, Entry]],
    keys: Mapping[str, Original],
    dtype: str | None,
) -> None:
    stored = {entry.name: name for name, entry in sources}
    table = _position_dtype(state, dtype)
    plan = {
        key: (
            original.shape,
            table if original.name == POSITION else dtype or state.dtypes[stored[original.name]],
        )
        for key, original in keys.items()
    }
    with StreamWriter(path, plan, single=True) as writer:
        pieces = (
            (key, state.read(name, region))
            for key, original in keys.items()
            for name in (stored[original.name],)
            for region in _in_file_order(state.shapes[name], original.swapped, state, name)
        )
        for key, piece in read_ahead(pieces):
            writer.write(key, cast(piece, plan[key][1]))


def _in_file_order(
    shape: tuple[int, ...], swapped: bool, state: offline.StateReader, name: str
) -> Iterator[tuple[slice, ...]]:
    """Regions of a stored tensor, in the order in which the file has their elements."""
    dtype = state.dtypes[name]
    if not swapped:
        yield from regions(shape, dtype)
        return
    half = shape[0] // 2
    for start in (half, 0):
        for first, *rest in regions((half, *shape[1:]), dtype):
            yield (slice(first.start + start, first.stop + start), *rest)


@contextmanager
def _verifying(checkpoint: Path) -> Iterator[Callable[[], None]]:
    """Compare the checkpoint's hashes in a thread while the block reads it.

    Yields:
        What waits for the verdict, and raises a CheckpointError that lists damaged files. The block
        calls it before its output appears. An error of the block gives way to the damage that may
        be its cause.
    """

    def whole() -> None:
        damage = verdict.result()
        if damage:
            files = listing("files", damage)
            raise CheckpointError(f"the checkpoint {checkpoint} is damaged:" + files)

    with ThreadPoolExecutor(1) as thread:
        verdict = thread.submit(verify, checkpoint)
        try:
            yield whole
        except Exception:
            whole()
            raise


def _open(
    checkpoint: Path, weights: Weights
) -> tuple[offline.StateReader, dict[str, Any], Weights]:
    """Reader, ``trainer.json`` and the kind of weights of a checkpoint."""
    extra = offline.read_extra(checkpoint)
    return offline.StateReader(checkpoint), extra, kind_of(extra, weights)


def _transformer_config(extra: Mapping[str, Any], checkpoint: Path) -> MMDiTConfig:
    model = extra.get("model", {})
    for key in ("transformer", "pretrained"):
        if key not in model:
            raise CheckpointError(f"{checkpoint / 'trainer.json'} does not record model.{key}")
    return MMDiTConfig.from_diffusers(model["transformer"])


def _sources(
    state: offline.StateReader, config: MMDiTConfig, weights: Weights, checkpoint: Path
) -> list[tuple[str, Entry]]:
    """Stored name and entry of every tensor to write, checked for presence and shape."""
    prefix = offline.EMA if weights == "ema" else offline.MODEL
    sources = [
        ((offline.MODEL if name == POSITION else prefix) + name, entry)
        for name, entry in mapping(config).items()
    ]
    missing = [name for name, _ in sources if name not in state.shapes]
    wrong = [
        f"{name}: {state.shapes[name]} stored, {entry.shape} expected"
        for name, entry in sources
        if name in state.shapes and state.shapes[name] != entry.shape
    ]
    if missing or wrong:
        raise CheckpointError(
            f"the checkpoint {checkpoint} does not hold the {weights} weights of its model:"
            + listing("missing tensors", missing)
            + listing("wrong shapes", wrong)
        )
    return sources


def _pipeline_parts(base: Path) -> list[Path]:
    """What to copy: the index of the pipeline and every component it names but the transformer."""
    index = base / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"the base {base} is no diffusers pipeline folder: {index} is missing. Name one with "
            "--base, or write the transformer alone with --transformer-only"
        )
    components = [
        base / name
        for name, value in json.loads(index.read_text()).items()
        if isinstance(value, list) and value[0] is not None and name != "transformer"
    ]
    missing = [str(part) for part in components if not part.is_dir()]
    if missing:
        raise CheckpointError(
            f"the base {base} is incomplete:" + listing("missing folders", missing)
        )
    return [index, *components]


def _write_config(path: Path, config: MMDiTConfig) -> None:
    content = {
        **config.to_diffusers(),
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": importlib.metadata.version("diffusers"),
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_weights(
    folder: Path,
    state: offline.StateReader,
    sources: list[tuple[str, Entry]],
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
    table = _position_dtype(state, dtype)
    plan = {}
    for name, entry in sources:
        kept = table if entry.name == POSITION else dtype or state.dtypes[name]
        plan.update({key: (entry.key_shape, kept) for key in entry.keys})
    with StreamWriter(folder, plan, max_shard_bytes) as writer:
        pieces = (
            (key, piece)
            for name, entry in sources
            for number, key in enumerate(entry.keys)
            for piece in _pieces(state, name, entry, number)
        )
        for key, piece in read_ahead(pieces):
            writer.write(key, cast(piece, plan[key][1]))


def _pieces(state: offline.StateReader, name: str, entry: Entry, number: int) -> Iterator[Array]:
    """The elements of one of an entry's diffusers tensors, row-major, in pieces of some MiB."""
    shape, dtype = state.shapes[name], state.dtypes[name]
    if len(entry.keys) == 1:  # a reshaped tensor has the same elements in the same order
        parts = regions(shape, dtype)
    else:
        one = slice(number, number + 1)
        parts = ((one, *rest) for rest in regions(shape[1:], dtype))
    for region in parts:
        yield state.read(name, region)


def _position_dtype(state: offline.StateReader, dtype: str | None) -> str:
    """``dtype`` if the position table loses no bit in it, else the stored one."""
    name = offline.MODEL + POSITION
    stored = state.dtypes[name]
    if dtype is None:
        return stored
    for region in regions(state.shapes[name], stored):
        piece = state.read(name, region)
        if not np.array_equal(cast(cast(piece, dtype), stored), piece):
            return stored
    return dtype
