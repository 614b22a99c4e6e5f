"""Whether diffusers computes from an export what our model computes from the checkpoint.

Legend for shapes: B samples, C channels, H height, W width.
"""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint import store
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.importer import load_checkpoint_weights
from soar_mega.checkpoint.torch_arrays import DTYPES
from soar_mega.checkpoint.weight_sources import Weights, transformer_folder
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import ModelInput, TextCondition

TOLERANCE = 1e-4  # of the largest output; both sides compute in fp32
_SIDE, _TEXT = 8, 7  # latent side (even, as patches are 2) and text tokens of the inputs


def verify_export(
    checkpoint: Path | str,
    out: Path | str,
    weights: Weights = "ema",
    dtype: str | None = None,
) -> float:
    """Compare one forward; one model is in memory at a time, in fp32.

    Args:
        checkpoint, weights: What was exported.
        out: The folder, or the single file.
        dtype: What the weights were cast to (a safetensors code), if they were.

    Returns:
        The largest difference over the largest output.

    Raises:
        CheckpointError: It is more than ``TOLERANCE``.
    """
    checkpoint = store.find(checkpoint)
    config = MMDiTConfig.from_diffusers(store.read_extra(checkpoint)["model"]["transformer"])
    x = _inputs(config)
    theirs_BCHW = _diffusers_forward(Path(out), config, x)
    gc.collect()
    ours_BCHW = _our_forward(checkpoint, config, weights, dtype, x)
    difference = float((ours_BCHW - theirs_BCHW).abs().max() / theirs_BCHW.abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{out} does not compute what {checkpoint} does: the outputs differ by "
            f"{difference:.2g} of the largest one, allowed are {TOLERANCE:g}"
        )
    return difference


def _inputs(config: MMDiTConfig) -> ModelInput:
    draw = torch.Generator().manual_seed(0)
    return ModelInput(
        torch.randn(2, config.in_channels, _SIDE, _SIDE, generator=draw),
        torch.tensor([321.0, 890.0]),
        TextCondition(
            torch.randn(2, _TEXT, config.joint_attention_dim, generator=draw),
            torch.randn(2, config.pooled_projection_dim, generator=draw),
        ),
    )


@torch.no_grad()
def _diffusers_forward(out: Path, config: MMDiTConfig, x: ModelInput) -> Tensor:
    from diffusers import SD3Transformer2DModel

    if out.is_file():
        with tempfile.TemporaryDirectory() as folder:
            content = {**config.to_diffusers(), "_class_name": "SD3Transformer2DModel"}
            Path(folder, "config.json").write_text(json.dumps(content))
            # Offline: left to itself, diffusers asks the hub for a published model's config.
            model = SD3Transformer2DModel.from_single_file(
                str(out), config=folder, torch_dtype=torch.float32, local_files_only=True
            )
    else:
        model = SD3Transformer2DModel.from_pretrained(
            transformer_folder(out), torch_dtype=torch.float32
        )
    model = model.float()  # from_pretrained leaves the position table's module as stored
    velocity_BCHW: Tensor = model(
        hidden_states=x.latent_BCHW,
        encoder_hidden_states=x.condition.text_BTE,
        pooled_projections=x.condition.pooled_BV,
        timestep=x.timestep_B,
    ).sample
    return velocity_BCHW


@torch.no_grad()
def _our_forward(
    checkpoint: Path,
    config: MMDiTConfig,
    weights: Weights,
    dtype: str | None,
    x: ModelInput,
) -> Tensor:
    stage = MMDiTStage(config, Mesh.single(), TorchBackend())
    load_checkpoint_weights(checkpoint, [stage], stage.mesh, weights)
    if dtype is not None:
        for parameter in stage.parameters():
            parameter.copy_(parameter.to(DTYPES[dtype]))
    velocity_BCHW: Tensor = stage(x)
    return velocity_BCHW
