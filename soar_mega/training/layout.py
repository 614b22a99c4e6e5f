"""From the ``parallel`` section to the stages of the model, and what of it can be refused."""

from __future__ import annotations

from soar_mega.config import Config
from soar_mega.config.world import check_world
from soar_mega.model.config import MMDiTConfig
from soar_mega.pipeline.schedules import virtual_stages
from soar_mega.pipeline.stages import check_stages, cut_layers, given_layout
from soar_mega.telemetry.flops import layer_costs
from soar_mega.training.precision import check_shapes


def cut_model(
    config: Config, architecture: MMDiTConfig, image_tokens: int, text_tokens: int
) -> tuple[range, ...]:
    """The layers of each stage, in the order a microbatch visits them.

    ``parallel.pipeline_layout`` where it is set, else the cut whose costliest stage has the fewest
    FLOPs, embeddings and head counted.

    Args:
        config: The configuration.
        architecture: Of the whole model.
        image_tokens, text_tokens: Of one sample.

    Raises:
        ValueError: The stages do not fit the layers, or the virtual stages the schedule.
    """
    parallel = config.parallel
    virtual = _virtual(config)
    stages = parallel.pipeline_model_parallel_size * virtual
    if parallel.pipeline_layout is not None:
        return given_layout(
            parallel.pipeline_layout, architecture.num_layers, stages, virtual=virtual
        )
    costs = layer_costs(architecture, image_tokens, text_tokens)
    return cut_layers(*costs, stages, virtual=virtual)


def check_layout(config: Config, architecture: MMDiTConfig, world_size: int) -> int:
    """Everything about a layout that can be refused before it is started.

    Args:
        config: The configuration.
        architecture: Of the whole model.
        world_size: Number of processes of the run.

    Returns:
        The data-parallel size.

    Raises:
        ConfigError, ValueError: The first problem, naming setting, value, rule and fix.
    """
    parallel = config.parallel
    data_size = check_world(config, world_size)
    architecture.check_tensor_parallel(parallel.tensor_model_parallel_size)
    check_shapes(config, architecture)
    virtual = _virtual(config)
    stages = parallel.pipeline_model_parallel_size * virtual
    check_stages(architecture.num_layers, stages, virtual)
    if parallel.pipeline_layout is not None:
        given_layout(parallel.pipeline_layout, architecture.num_layers, stages, virtual=virtual)
    return data_size


def _virtual(config: Config) -> int:
    """Stages a pipeline rank owns."""
    parallel = config.parallel
    return virtual_stages(parallel.pipeline_schedule, parallel.virtual_pipeline_model_parallel_size)
