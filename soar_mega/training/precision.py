"""From the ``precision`` section to the backend of the model, and what of it can be refused."""

from __future__ import annotations

from typing import Any

import torch

from soar_mega.backends import Backend
from soar_mega.backends.elementwise import Elementwise
from soar_mega.backends.te import overlap
from soar_mega.backends.te.backend import TEBackend
from soar_mega.backends.te.recipes import multiple_of, why_not
from soar_mega.backends.torch import TorchBackend
from soar_mega.config import Config, ConfigError
from soar_mega.config.precision import PrecisionConfig
from soar_mega.launch.optional import OPTIONAL, is_there
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.recompute import BlockCall, compiled_run_block, run_block
from soar_mega.parallel.collectives import padded_length
from soar_mega.parallel.mesh import Mesh, stage_group
from soar_mega.pipeline.actions import Kind, Schedule

PACKAGE = "transformer_engine"


def check_backend(config: PrecisionConfig, device: torch.device) -> None:
    """Refuse a backend or a recipe that cannot run here.

    Raises:
        ConfigError: Transformer Engine is not installed, there is no CUDA, or this GPU lacks the
            recipe.
    """
    if config.backend == "torch":
        return
    if not is_there(PACKAGE):
        shown, way = OPTIONAL[PACKAGE]
        raise ConfigError(
            f"precision.backend = te needs {shown}, which is not installed: {way} or start in the "
            "project's container, or use precision.backend = torch (bf16)"
        )
    if device.type != "cuda":
        raise ConfigError(
            f"precision.backend = te runs on CUDA, but this run is on {device.type} (run.device): "
            "use precision.backend = torch"
        )
    reason = None if config.recipe is None else why_not(config.recipe)
    if reason is not None:
        raise ConfigError(
            f"precision.fp8_recipe = {config.recipe} does not run on this GPU "
            f"({torch.cuda.get_device_name(device)}): {reason} Use another recipe, or none"
        )


def check_shapes(config: Config, architecture: MMDiTConfig) -> None:
    """Refuse linears that FP8 cannot multiply; tokens are padded, so only features count.

    Raises:
        ConfigError: Names the recipe, the layer's size on one rank, the rule and what works.
    """
    precision, ranks = config.precision, config.parallel.tensor_model_parallel_size
    beyond = [n for n in precision.bf16_layers if not 0 <= n < architecture.num_layers]
    if beyond:
        raise ConfigError(
            f"precision.bf16_layers names {beyond}, but the model has the blocks 0 to "
            f"{architecture.num_layers - 1}: leave them out"
        )
    multiple = multiple_of(precision.recipe)
    wrong = _wrong_features(architecture, ranks, multiple)
    if wrong is None:
        return
    works = [
        n
        for n in range(1, architecture.num_attention_heads + 1)
        if architecture.can_cut(n) and _wrong_features(architecture, n, multiple) is None
    ]
    fix = f"use {works}" if works else "no size works"
    raise ConfigError(
        f"precision.fp8_recipe = {precision.recipe} needs the features of each linear in multiples "
        f"of {multiple}, but with parallel.tensor_model_parallel_size = {ranks} a rank's {wrong}: "
        f"{fix} for it, or precision.fp8_recipe = {_instead(precision.recipe)}"
    )


def _instead(recipe: str | None) -> str:
    return "current (multiples of 16) or none" if recipe == "mxfp8" else "none"


def _wrong_features(architecture: MMDiTConfig, ranks: int, multiple: int) -> str | None:
    """The first size that is no multiple, in words."""
    width = architecture.width
    heads = -(-architecture.num_attention_heads // ranks)
    sizes = {
        "attention has": heads * architecture.attention_head_dim,
        "blocks have": width,
        "MLP has": 4 * width // ranks,
    }
    return next((f"{what} {n}" for what, n in sizes.items() if n % multiple), None)


def make_backend(
    config: Config, architecture: MMDiTConfig, mesh: Mesh, schedule: Schedule, image_tokens: int
) -> Backend:
    """The maker of the model's parts; every rank calls it.

    Args:
        config, mesh, schedule: Of the run.
        architecture: Of the whole model.
        image_tokens: Of one sample.
    """
    precision = config.precision
    if precision.backend == "torch":
        return TorchBackend()
    overlaps, multiple = config.parallel.tensor_parallel_overlap, multiple_of(precision.recipe)
    if overlaps:
        tokens = padded_length(image_tokens, mesh.tensor_size, multiple)
        overlap.start(
            mesh,
            tokens * config.train.micro_batch_size,
            architecture.width,
            fp8=precision.recipe is not None,
        )
    kinds = {action.kind for actions in schedule.actions for action in actions}
    return TEBackend(
        precision.recipe,
        bf16_layers=precision.bf16_layers,
        split_backwards=Kind.INPUT_BACKWARD in kinds,
        amax_group=stage_group(mesh) if precision.recipe == "delayed" else None,
        elementwise=_elementwise(config),
        overlaps=overlaps,
    )


def block_call(config: Config) -> BlockCall:
    """How blocks are called; Transformer Engine's cannot be compiled whole."""
    if config.precision.backend == "te" or not config.precision.compile:
        return run_block
    # Each picture size is several graphs, which take a minute: many sizes share theirs.
    dynamic = False if config.data.max_aspect_ratio == 1 else None
    return compiled_run_block(dynamic=dynamic, **_compile_options(config))


def _elementwise(config: Config) -> Elementwise:
    if not config.precision.compile:
        return Elementwise()
    return Elementwise.compiled(**_compile_options(config))


def _compile_options(config: Config) -> dict[str, Any]:
    if config.parallel.tensor_model_parallel_size == 1:
        return {}
    # Peers compute the same weights' gradients, to the bit: none may choose a reduction by its own
    # stopwatch. With run.deterministic no process does.
    return {"options": {"deterministic": True}}
