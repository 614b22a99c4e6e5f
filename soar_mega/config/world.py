"""Rules between a configuration and the number of processes it runs on."""

from __future__ import annotations

from soar_mega.config.errors import ConfigError
from soar_mega.config.schema import Config


def check_world(config: Config, world_size: int) -> int:
    """Check the configuration against the number of processes.

    Args:
        config: The configuration.
        world_size: Number of processes of the run.

    Returns:
        The data-parallel size: processes over the tensor- times the pipeline-parallel size.

    Raises:
        ConfigError: The processes do not divide into groups that hold a model each, or the global
            batch does not divide into the micro-batches of every data-parallel rank.
    """
    tensor = config.parallel.tensor_model_parallel_size
    pipeline = config.parallel.pipeline_model_parallel_size
    model = tensor * pipeline
    if world_size % model:
        works = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        near = [n for n in (world_size // model * model, -(-world_size // model) * model) if n]
        settings, what = f"parallel.tensor_model_parallel_size = {tensor}", "a size"
        if pipeline > 1:
            settings += f" times parallel.pipeline_model_parallel_size = {pipeline}, {model},"
            what = "a product"
        raise ConfigError(
            f"{settings} must divide the number of processes, "
            f"which is {world_size}; use {what} of {works}, or start "
            f"{' or '.join(map(str, near))} processes"
        )
    data = world_size // model
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    unit = data * micro
    if total % unit:
        near = [n for n in (total // unit * unit, -(-total // unit) * unit) if n]
        fix = f"use train.global_batch_size = {' or '.join(map(str, near))}"
        if total % data == 0:
            share = total // data
            sizes = [n for n in range(1, share + 1) if share % n == 0]
            best = min(sizes, key=lambda n: abs(n - micro))
            fix += f", or train.micro_batch_size = {best}"
        divided = f"parallel.tensor_model_parallel_size {tensor}"
        if pipeline > 1:
            divided += f" / parallel.pipeline_model_parallel_size {pipeline}"
        raise ConfigError(
            f"train.global_batch_size = {total} must be a multiple of {unit} = data-parallel size "
            f"{data} (processes {world_size} / {divided}) x "
            f"train.micro_batch_size {micro}; {fix}"
        )
    group = config.group_size
    if total // data % group:
        raise ConfigError(
            f"train.global_batch_size = {total} gives each of {data} data-parallel ranks "
            f"{total // data} samples, which must be whole groups of data.bucket_group_size = "
            f"{group}: use a multiple of {data * group}"
        )
    return data
