"""Refuses a layout that cannot work, naming the nearest ones that do."""

from __future__ import annotations

import math
from collections.abc import Iterator

from soar_mega.config import Config, ConfigError
from soar_mega.model.config import MMDiTConfig
from soar_mega.training.layout import check_layout

_SHOWN = 5


def checked_data_size(config: Config, architecture: MMDiTConfig, gpus: int) -> int:
    """The data-parallel size of a layout that works.

    Raises:
        ConfigError: It does not work: the rule, and the nearest layouts of as many GPUs that do.
    """
    try:
        return check_layout(config, architecture, gpus)
    except (ConfigError, ValueError) as error:
        nearest = nearest_layouts(config, architecture, gpus)
        if not nearest:
            raise ConfigError(
                f"{error}\nno layout of {gpus} GPUs works with this model and "
                f"train.global_batch_size = {config.train.global_batch_size}, "
                f"train.micro_batch_size = {config.train.micro_batch_size}"
            ) from error
        lines = "\n".join(f"  {layout}" for layout in nearest)
        raise ConfigError(f"{error}\nnearest layouts of {gpus} GPUs that work:\n{lines}") from error


def nearest_layouts(config: Config, architecture: MMDiTConfig, gpus: int) -> list[str]:
    """Layouts that pass every check, nearest to what was asked for first, as overrides."""
    works = []
    for changes in _candidates(config, gpus):
        parallel = config.parallel.model_copy(update=changes)
        changed = config.model_copy(update={"parallel": parallel})
        try:
            data_size = check_layout(changed, architecture, gpus)
        except (ConfigError, ValueError):
            continue
        works.append((_distance(config, changed), _text(config, changed, data_size)))
    return list(dict.fromkeys(text for _, text in sorted(works)))[:_SHOWN]


def _candidates(config: Config, gpus: int) -> Iterator[dict[str, object]]:
    """Tensor and pipeline sizes, and for each what the schedule needs besides."""
    asked = config.parallel
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tensor in sizes:
        for pipeline in sizes:
            base: dict[str, object] = {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
            }
            if asked.pipeline_layout is not None:
                yield dict(base)
            base["pipeline_layout"] = None
            schedule = asked.pipeline_schedule if pipeline > 1 else "1f1b"
            base["pipeline_schedule"] = schedule
            yield dict(base)
            # No more stages a rank than were asked for: fewer may fit the layers.
            for virtual in (None, *range(3, asked.virtual_pipeline_model_parallel_size or 0)):
                yield {**base, "virtual_pipeline_model_parallel_size": virtual}


def _distance(asked: Config, changed: Config) -> tuple[float, int]:
    """How far the sizes are from what was asked, in doublings; then how many settings change."""
    far = 0.0
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        far += abs(math.log2(getattr(changed.parallel, key) / getattr(asked.parallel, key)))
    return far, len(_changes(asked, changed))


def _changes(asked: Config, changed: Config) -> dict[str, object]:
    """Settings that differ, but for the two sizes, which are always shown."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return {
        key: value
        for key, value in changed.parallel.model_dump().items()
        if key not in sizes and value != getattr(asked.parallel, key)
    }


def _text(asked: Config, changed: Config, data_size: int) -> str:
    parallel = changed.parallel
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
    }
    settings = {**sizes, **_changes(asked, changed)}
    words = [f"parallel.{k}={'null' if v is None else v}" for k, v in settings.items()]
    return f"{' '.join(words)}  (data-parallel size {data_size})"
