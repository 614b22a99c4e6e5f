"""Tensor-parallel communication beside the products it serves: Transformer Engine's Userbuffers.

Its buffers have one shape for all passes, and layers share them by name, so only the image stream
has them. Never run on GPUs: it takes several of them with NVLink.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch

from soar_mega.backends import Overlap
from soar_mega.parallel.mesh import Mesh

Mode = Literal["column", "row"]


def overlap_options(mode: Mode, name: Overlap) -> dict[str, Any]:
    """What ``te.Linear`` is told: which of its communication to overlap, in whose buffers.

    A column-parallel layer gathers its input beside the forward product and again beside the input
    gradient's, and scatters the input gradient beside the weight gradient's. A row-parallel one
    scatters its output beside the forward product and gathers the gradient beside the input
    gradient's.
    """
    if mode == "column":
        return {
            "ub_overlap_ag": True,
            "ub_bulk_dgrad": True,
            "ub_bulk_wgrad": True,
            "ub_name": name,
        }
    return {"ub_overlap_rs": True, "ub_overlap_ag": True, "ub_name": name}


def start(mesh: Mesh, tokens: int, width: int, *, fp8: bool) -> None:
    """Make the buffers; every rank calls it, once.

    Args:
        mesh: Where this process stands; tensor ranks must share a node.
        tokens: Image tokens of a pass, padding included, over all its samples and tensor ranks.
        width: Of the image stream.
        fp8: Whether the layers run in FP8.

    Raises:
        ValueError: Transformer Engine cannot make them; in its words.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    modes = base.UserBufferQuantizationMode
    try:
        base.initialize_ub(
            shape=[tokens, width],
            tp_size=mesh.tensor_size,
            quantization_modes=[modes.FP8 if fp8 else modes.NONE],
            dtype=torch.bfloat16,
            bootstrap_backend="nccl",
        )
    except RuntimeError as error:
        raise ValueError(
            "parallel.tensor_parallel_overlap = true, but Transformer Engine cannot make its "
            f"buffers here: {error} Tensor-parallel processes must share a node with NVLink; else "
            "set it to false"
        ) from error
