"""What is checked before a training job is submitted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from soar_mega import hub
from soar_mega.checkpoint.diffusers_map import mapping
from soar_mega.config import Config, ConfigError, load_config
from soar_mega.data.errors import DataError
from soar_mega.data.shards.patterns import find_shards
from soar_mega.data.shards.remote import is_remote
from soar_mega.launch.mounts import local_file_system
from soar_mega.model.config import MMDiTConfig
from soar_mega.telemetry.metrics import FILE_NAME as METRICS
from soar_mega.telemetry.metrics import read_metrics
from soar_mega.training.plan import make_plan
from soar_mega.training.plan_times import gpu_named

# Bytes a second that a node writes of a checkpoint, where nothing was measured.
_WRITE_RATE = 0.5e9
_STATE_BYTES = 16  # of a parameter: fp32 weights, their average, Adam's two moments


@dataclass(frozen=True)
class Size:
    """Of a job.

    Attributes:
        nodes, gpus_per_node: Nodes and processes of each.
        gpu: Name, one of ``plan_times.GPUS``.
        lead_s: Seconds from the signal to the job's end.
        local_storage: Whether storage that one node alone sees is all right.
    """

    nodes: int
    gpus_per_node: int
    gpu: str
    lead_s: int
    local_storage: bool = False


def check_submission(path: str, overrides: Sequence[str], size: Size, mounts: str) -> list[str]:
    """What speaks against starting this job.

    Args:
        path: The configuration.
        overrides: ``section.key=value``.
        size: Of the job.
        mounts: Text of ``/proc/mounts``.
    """
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        return [str(error)]
    return [*_layout(config, size), *_storage(config, size, mounts)]


def _layout(config: Config, size: Size) -> Iterator[str]:
    """Whether it can run and fits, and whether the signal leaves time to save."""
    try:
        plan = make_plan(config, size.nodes * size.gpus_per_node, gpu_named(size.gpu))
        fits, step_s = plan.fits, plan.step_time
    except (ConfigError, ValueError, OSError) as error:
        yield str(error)
        return
    if not fits:
        peak = max(memory.peak for memory in plan.memory) / 1e9
        yield (
            f"memory: {peak:.1f} GB on the fullest GPU, but {plan.gpu.name} has "
            f"{plan.gpu.memory:g}: use more pipeline or tensor parallelism, "
            "train.activation_checkpointing = full, or a smaller "
            "train.micro_batch_size (tools/plan.py shows what takes it)"
        )
    measured = _measured_step(Path(config.run.dir))
    save_s = checkpoint_bytes(plan.architecture) / (_WRITE_RATE * size.nodes)
    needed = (measured or step_s) + save_s
    if needed > size.lead_s:
        how = "measured" if measured else "modelled"
        yield (
            f"signal: it comes {size.lead_s} s before the end (--signal-lead), but a step ({how}) "
            f"takes {measured or step_s:.1f} s and a checkpoint about {save_s:.0f} s: use "
            f"--signal-lead {round(1.5 * needed) + 1}"
        )


def checkpoint_bytes(architecture: MMDiTConfig) -> int:
    """Size of a checkpoint of this model, before one was made."""
    return _STATE_BYTES * sum(math.prod(entry.shape) for entry in mapping(architecture).values())


def _measured_step(folder: Path) -> float | None:
    """Median seconds of the run's last steps, if it ran before."""
    if not (folder / METRICS).is_file():
        return None
    times = [line.get("perf/step_time_s") for line in read_metrics(folder)[-50:]]
    known = [time for time in times if time is not None]
    return median(known) if known else None


def _storage(config: Config, size: Size, mounts: str) -> Iterator[str]:
    """Whether data, model and run folder are there, and for all nodes."""
    places = {"run.dir": [Path(config.run.dir)]}
    sources = {f"data.sources ({source.name})": source.shards for source in config.data.sources}
    if config.data.shards is not None:
        sources["data.shards"] = config.data.shards
    for setting, shards in sources.items():
        try:
            found = find_shards(shards, setting=setting)
        except (DataError, OSError) as error:
            yield str(error)
            continue
        places[setting] = [Path(shard) for shard in found if not is_remote(shard)]
    if not hub.parse(config.model.source):
        folder = Path(config.model.pretrained)
        places["model.pretrained"] = [folder]
        if not (folder / "model_index.json").is_file():
            yield f"model.pretrained = {folder} is no diffusers folder: it has no model_index.json"
    if size.nodes == 1 or size.local_storage:
        return
    for setting, paths in places.items():
        for kind in sorted({kind for p in paths if (kind := local_file_system(p, mounts))}):
            yield (
                f"{setting} lies on {kind}, which other nodes do not see: use storage that all "
                "nodes share, or --allow-local-storage where every node has the same there"
            )
