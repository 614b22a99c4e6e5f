"""Loads a checkpoint's weights into a tensor- and pipeline-parallel layout and saves them again.

Only the pieces are in memory, in the stored dtype, no model: so a model's real size fits.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.diffusers_map import POSITION
from soar_mega.checkpoint.torch_arrays import DTYPES
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import layout_of
from soar_mega.parallel.mesh import Mesh


def reshard(source: Path, root: Path, tensor_size: int, pipeline_size: int) -> Path:
    """Write what ``source`` holds from ``tensor_size * pipeline_size`` processes, each its pieces.

    Args:
        source: A checkpoint with weights only.
        root: Folder of the new checkpoint.
        tensor_size, pipeline_size: The layout.

    Returns:
        The new checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (tensor_size, pipeline_size, folder, source, root)
        multiprocessing.spawn(_rank, arguments, tensor_size * pipeline_size)
    return store.find(root)


def _rank(rank: int, tensor: int, pipeline: int, folder: str, source: Path, root: Path) -> None:
    world = tensor * pipeline
    meeting = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world)
    mesh = Mesh.build(tensor, pipeline_size=pipeline)
    extra, codes = store.read_extra(source), store.StateReader(source).dtypes
    config = MMDiTConfig.from_diffusers(extra["model"]["transformer"])
    first, last = (config.num_layers * (mesh.pipeline_rank + n) // pipeline for n in (0, 1))
    nowhere = replace(mesh, device=torch.device("meta"))
    stage = MMDiTStage(config, nowhere, TorchBackend(), layers=range(first, last))
    pieces = {}
    for name, parameter in stage.named_parameters():
        full, layout = store.MODEL + name, layout_of(parameter)
        local = torch.zeros(parameter.numel(), dtype=DTYPES[codes[full]])
        pieces[full] = BoxedTensor.from_range(layout, mesh, 0, len(local), local)
    if stage.is_first:
        full = store.MODEL + POSITION
        table = torch.empty(stage.patch_embed.position.shape, dtype=DTYPES[codes[full]])
        pieces[full] = BoxedTensor.whole(table, contribute=mesh.tensor_rank == 0)
    store.load(source, pieces, mesh)
    store.save(root, 0, pieces, extra, mesh)
    dist.destroy_process_group()
