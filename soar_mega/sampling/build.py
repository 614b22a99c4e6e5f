"""The stages of a model that only draws, and the velocities they compute together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from soar_mega.backends.torch import TorchBackend
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.pipeline.actions import Placement
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_forwards
from soar_mega.pipeline.stages import cut_layers
from soar_mega.sampling.generate import ModelFunction


def build_stage(
    architecture: MMDiTConfig,
    mesh: Mesh,
    dtype: torch.dtype,
    costs: tuple[Sequence[float], float, float],
) -> MMDiTStage:
    """This process's stage, without weights.

    Args:
        architecture: Of the whole model.
        mesh: Where this process stands; a pipeline rank owns one stage.
        dtype: To compute in.
        costs: Of each layer, of the embeddings, of the head; for the cut into stages.

    Raises:
        ValueError: The tensor-parallel size does not cut the model, or there are more pipeline
            ranks than layers.
    """
    layers = cut_layers(*costs, mesh.pipeline_size)[mesh.pipeline_rank]
    return MMDiTStage(architecture, mesh, TorchBackend(), layers=layers).to(dtype).eval()


def velocities_of(stage: MMDiTStage, mesh: Mesh) -> ModelFunction:
    """What ``generate`` calls; every rank of a model makes one, and calls it with the others."""
    forwards = build_forwards(Placement(mesh.pipeline_size, 1, False), 1)
    return Pipeline([stage], mesh, forwards).forward_everywhere
