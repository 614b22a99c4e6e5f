"""What a run's checkpoint holds, and taking a run up from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from soar_mega.checkpoint import store
from soar_mega.checkpoint.agree import on_rank_0
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.config import Config, ConfigError
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.step import Stepper

CHECKPOINTS = "checkpoints"
_POSITION = "patch_embed.position"


def _tensors(stepper: Stepper) -> dict[str, BoxedTensor]:
    """Name -> this rank's piece of every tensor of the training state (views, not copies)."""
    mesh = stepper.mesh
    shards: dict[str, Tensor] = {
        store.MODEL: stepper.parameters.master_shard,
        store.EMA: stepper.ema.shard,
        "optimizer.exp_avg.": stepper.optimizer.exp_avg,
        "optimizer.exp_avg_sq.": stepper.optimizer.exp_avg_sq,
    }
    pieces = {}
    for piece in stepper.parameters.fragments():
        own = slice(piece.shard_start, piece.shard_start + piece.stop - piece.start)
        for prefix, shard in shards.items():
            pieces[prefix + piece.name] = BoxedTensor.from_range(
                piece.layout, mesh, piece.start, piece.stop, shard[own]
            )
    for stage in stepper.stages:
        if stage.is_first:
            table = stage.patch_embed.position
            first = mesh.data_rank == mesh.tensor_rank == 0
            pieces[store.MODEL + _POSITION] = BoxedTensor.whole(table, contribute=first)
    return pieces


def save(
    stepper: Stepper,
    step: int,
    lineage: Mapping[str, Any],
    data_fingerprint: str,
    data_state: Mapping[str, Any],
) -> Path:
    """Commit a checkpoint after ``step`` steps; every rank calls it.

    Args:
        lineage: Where the starting weights come from.
        data_fingerprint: Of the training data.
        data_state: Where its order stands.
    """
    config = stepper.config
    extra = {
        "step": step,
        "optimizer_updates": stepper.optimizer.step,
        "model": {
            # Absolute, so that converters find it from any working directory.
            "pretrained": str(Path(config.model.pretrained).resolve()),
            "transformer": stepper.architecture.to_diffusers(),
            "max_sequence_length": config.data.max_sequence_length,
        },
        "run": _identity(config, data_fingerprint),
        "data": dict(data_state),
        "lineage": {
            "run": config.run.name or Path(config.run.dir).name,
            "step": step,
            "objective": config.objective.name,
            **lineage,
        },
    }
    return store.save(
        Path(config.run.dir) / CHECKPOINTS,
        step,
        _tensors(stepper),
        extra,
        stepper.mesh,
        keep=config.checkpoint.checkpoints_total_limit,
    )


def _identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What must not change within a run, because sample order and draws hang on it."""
    return {
        "run.seed": config.run.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "objective.name": config.objective.name,
        "data.shards": data_fingerprint,
        "data.shuffle_shards": config.data.shuffle_shards,
    }


def find(config: Config, mesh: Mesh) -> Path | None:
    """The checkpoint ``checkpoint.resume`` names; None: start fresh. Equal on all ranks.

    Raises:
        CheckpointError: An explicit path that is no committed checkpoint.
        ConfigError: A fresh start into a folder that already holds checkpoints.
    """
    root = Path(config.run.dir) / CHECKPOINTS
    found = store.resolve(config.checkpoint.resume, root, mesh)
    if found is not None and found.resolve().parent != root.resolve() and store.latest(root):
        raise ConfigError(
            f"checkpoint.resume = {found} is of another run than run.dir = {config.run.dir}, which "
            "holds checkpoints of its own: choose another run.dir, or start a new run from it with "
            "model.init_from"
        )
    if found is None and config.checkpoint.resume == "none" and store.latest(root) is not None:
        raise ConfigError(
            f"run.dir = {config.run.dir} already holds checkpoints and checkpoint.resume is none: "
            "set checkpoint.resume=latest to go on with that run, or choose another run.dir"
        )
    return found


def resume(stepper: Stepper, path: Path, data_fingerprint: str) -> tuple[int, dict[str, Any], Any]:
    """Take up weights, EMA and optimizer from ``path``; every rank calls it.

    Later checkpoints of the same run are set aside, because their steps are done again.

    Returns:
        The steps done, the recorded lineage, and where the data stood (None if it says nothing).

    Raises:
        CheckpointError: The checkpoint does not load or does not fit the model.
        ConfigError: The run would not be the same one: another seed, batch, objective or data.
    """
    recorded = store.read_extra(path)
    for name, value in _identity(stepper.config, data_fingerprint).items():
        before = recorded["run"].get(name)
        if before != value:
            raise ConfigError(
                f"checkpoint.resume = {path}: {name} was {before!r} and is now {value!r}: put it "
                "back, or start a new run with model.init_from"
            )
    extra = store.load(path, _tensors(stepper), stepper.mesh)
    stepper.optimizer.step = extra["optimizer_updates"]
    stepper.parameters.publish()
    if path.resolve().parent == (Path(stepper.config.run.dir) / CHECKPOINTS).resolve():
        on_rank_0(
            stepper.mesh,
            lambda: [str(p) for p in store.set_aside_after(path.resolve().parent, extra["step"])],
            f"cannot set aside the checkpoints after {path}",
        )
    return extra["step"], extra["lineage"], extra.get("data")
