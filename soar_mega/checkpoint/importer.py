"""Weights into a model stage: from a diffusers folder, or from a checkpoint of ours.

Each rank reads its own slices, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soar_mega.checkpoint import store
from soar_mega.checkpoint.agree import on_rank_0
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.diffusers_map import POSITION, check_keys, mapping
from soar_mega.checkpoint.errors import CheckpointError, listing
from soar_mega.checkpoint.manifest import identity
from soar_mega.checkpoint.safetensors_files import SafetensorsFolder
from soar_mega.checkpoint.selection import select_source
from soar_mega.checkpoint.torch_arrays import as_tensor
from soar_mega.checkpoint.weight_sources import (
    Weights,
    ancestors,
    find_weights,
    kind_of,
    read_transformer_config,
    transformer_folder,
)
from soar_mega.model.config import MMDiTConfig
from soar_mega.parallel.layout import fill_parameter, layout_of, local_slice
from soar_mega.parallel.mesh import Mesh


def load_diffusers_transformer(
    folder: Path | str, modules: Sequence[nn.Module], mesh: Mesh
) -> None:
    """Fill stages' parameters and position table from a diffusers folder, in place.

    The position table is taken over bit for bit, in the file's dtype.

    Args:
        folder: A diffusers pipeline folder or a transformer alone; one file or shards.
        modules: The ``MMDiTStage``s of this process; every parameter carries its layout.
        mesh: This process: which slices it needs.

    Raises:
        CheckpointError: No diffusers folder; keys missing, unexpected or wrongly shaped (all are
            listed); another architecture than the modules'. Nothing is changed then.
    """
    config = MMDiTConfig.from_diffusers(read_transformer_config(folder))
    files = SafetensorsFolder(transformer_folder(folder))
    check_keys(config, files.shapes, str(files.folder))
    table = mapping(config)
    _check_fit(modules, {name: entry.shape for name, entry in table.items()}, str(folder))
    with torch.no_grad():
        for name, parameter in _parameters(modules):
            region = local_slice(layout_of(parameter), mesh)
            fill_parameter(parameter, mesh, as_tensor(table[name].to_ours(files.read, region)))
    for module in modules:
        if POSITION in dict(module.named_buffers()):
            position = as_tensor(table[POSITION].to_ours(files.read)).to(mesh.device)
            _set_buffer(module, POSITION, position)


def load_checkpoint_weights(
    path: Path | str, modules: Sequence[nn.Module], mesh: Mesh, weights: Weights = "ema"
) -> dict[str, Any]:
    """Fill stages' parameters and position table from a checkpoint of ours, in place.

    Args:
        path: A committed checkpoint, of any layout.
        modules: This process's ``MMDiTStage``s, of the same architecture.
        mesh: This process among all; every rank calls it.
        weights: ``ema`` or ``plain``.

    Returns:
        The checkpoint's ``trainer.json``.

    Raises:
        CheckpointError: On every rank: see ``store.load``.
    """
    extra = on_rank_0(mesh, lambda: store.read_extra(path), f"cannot read {path}")
    prefix = store.EMA if kind_of(extra, weights) == "ema" else store.MODEL
    wanted: dict[str, BoxedTensor] = {}
    # Stored in fp32; cast to the parameter's dtype while it is copied in.
    for name, parameter in _parameters(modules):
        whole = parameter.data.view(-1)
        wanted[prefix + name] = BoxedTensor.from_range(
            layout_of(parameter), mesh, 0, whole.numel(), whole
        )
    for module in modules:
        buffers = dict(module.named_buffers())
        if POSITION in buffers:
            _set_buffer(module, POSITION, torch.empty_like(buffers[POSITION], dtype=torch.float32))
            position = module.get_buffer(POSITION)
            wanted[store.MODEL + POSITION] = BoxedTensor.whole(position)
    return store.load(path, wanted, mesh)


def load_weights(
    source: Path | str, modules: Sequence[nn.Module], mesh: Mesh, weights: Weights = "ema"
) -> list[dict[str, Any]]:
    """Fill stages from what ``model.init_from`` may name; every rank calls it.

    Args:
        source: A run folder (its newest checkpoint), a checkpoint, or a diffusers folder.
        modules, mesh, weights: See ``load_checkpoint_weights``; a diffusers folder has one kind.

    Returns:
        The ancestors of weights that are trained on from here, newest first: plain values.

    Raises:
        CheckpointError: It is neither, is damaged, or does not fit the model.
    """
    what = f"cannot take weights from {source}"
    if on_rank_0(mesh, lambda: find_weights(source) is None, what):
        load_diffusers_transformer(source, modules, mesh)
        return on_rank_0(mesh, lambda: ancestors(source), what)
    path = select_source(source, mesh)
    extra = load_checkpoint_weights(path, modules, mesh, weights)
    record = dict(extra.get("lineage", {}))
    parents = record.pop("parents", [])
    hashed = on_rank_0(mesh, lambda: identity(path), what)
    here = {"weights": kind_of(extra, weights), "checkpoint": str(path), "hash": hashed}
    return [{**record, **here}, *parents]


def _parameters(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    return (item for module in modules for item in module.named_parameters())


def _check_fit(
    modules: Sequence[nn.Module], shapes: dict[str, tuple[int, ...]], where: str
) -> None:
    layouts = {name: layout_of(parameter) for name, parameter in _parameters(modules)}
    unknown = [name for name in layouts if name not in shapes]
    wrong = [
        f"{name}: {shapes[name]} in the folder, {layout.global_shape} in the model"
        for name, layout in layouts.items()
        if name in shapes and layout.global_shape != shapes[name]
    ]
    problems = listing("parameters not in the folder", unknown) + listing("wrong shapes", wrong)
    if problems:
        raise CheckpointError(f"the transformer in {where} is another architecture: {problems}")


def _set_buffer(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, value)
