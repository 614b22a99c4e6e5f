"""Taking a run up from a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.checkpoint import store
from soar_mega.checkpoint.agree import on_rank_0
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.selection import Selection, select
from soar_mega.config import Config, ConfigError
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.saving import FP8, checkpoints_of, identity_of, precision_of, state_of
from soar_mega.training.step import Stepper


def find(config: Config, mesh: Mesh) -> Selection:
    """The checkpoint ``checkpoint.resume`` names, verified. Equal on all ranks.

    Raises:
        CheckpointError: An explicit path that is no whole checkpoint; ``latest`` where there are
            checkpoints and none is whole.
        ConfigError: A fresh start into a folder that already holds checkpoints, or one that
            ``checkpoint.allow_fresh`` forbids.
    """
    root, settings = checkpoints_of(config), config.checkpoint
    selection = select(settings.resume, root, mesh)
    own = on_rank_0(mesh, lambda: store.latest(root) is not None, f"cannot look at {root}")
    path = selection.path
    if path is not None and path.resolve().parent != root.resolve() and own:
        raise ConfigError(
            f"checkpoint.resume = {path} is of another run than run.dir = {config.run.dir}, which "
            "holds checkpoints of its own: choose another run.dir, or start a new run from it with "
            "model.init_from"
        )
    if path is None and settings.resume == "none" and own:
        raise ConfigError(
            f"run.dir = {config.run.dir} already holds checkpoints and checkpoint.resume is none: "
            "set checkpoint.resume=latest to go on with that run, or choose another run.dir"
        )
    if path is None and settings.resume == "latest" and not settings.allow_fresh:
        raise ConfigError(
            f"checkpoint.resume = latest, but {root} holds no checkpoint and "
            "checkpoint.allow_fresh is false: name the run.dir of the run that is to go on, or set "
            "checkpoint.allow_fresh=true to begin it"
        )
    return selection


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says about the run that goes on.

    Attributes:
        path: The checkpoint.
        steps: Done.
        lineage: The recorded ``parents``.
        data: Where the data stood; None if it says nothing.
        health: How the steps went; None if it says nothing.
        changes: Of number formats since then, in words.
        set_aside: Later checkpoints of the run, under their new names.
        seconds: It took to read the state.
    """

    path: Path
    steps: int
    lineage: list[dict[str, Any]]
    data: Any
    health: Any
    changes: list[str]
    set_aside: list[str]
    seconds: float


def resume(stepper: Stepper, selection: Selection, data_fingerprint: str) -> Resumed:
    """Take up weights, EMA and optimizer from a checkpoint; every rank calls it.

    Later checkpoints of the same run are set aside, because their steps are done again.

    Raises:
        CheckpointError: The checkpoint does not load or does not fit the model.
        ConfigError: The run would not be the same one: another seed, batch, objective or data.
    """
    path, mesh, began = selection.path, stepper.mesh, time.perf_counter()
    assert path is not None
    recorded = on_rank_0(mesh, lambda: _read_record(path), f"cannot resume from {path}")
    for name, value in identity_of(stepper.config, data_fingerprint).items():
        before = recorded["run"].get(name)
        if before != value:
            raise ConfigError(
                f"checkpoint.resume = {path}: {name} was {before!r} and is now {value!r}: put it "
                "back, or start a new run with model.init_from"
            )
    state = state_of(stepper)
    lost = _lost_scales(path, state, mesh)
    store.load(path, {name: x for name, x in state.items() if name not in lost}, mesh)
    stepper.optimizer.step = recorded["optimizer_updates"]
    stepper.parameters.publish()
    root, moved = path.resolve().parent, []
    if root == checkpoints_of(stepper.config).resolve():
        damaged = {damaged.resolve() for damaged in selection.damaged}
        moved = on_rank_0(
            mesh,
            lambda: [str(p) for p in store.set_aside_after(root, recorded["step"], damaged)],
            f"cannot set aside the checkpoints after {path}",
        )
    return Resumed(
        path,
        recorded["step"],
        recorded["lineage"]["parents"],
        recorded.get("data"),
        recorded.get("health"),
        _changes(stepper.config, recorded.get("precision"), bool(lost)),
        moved,
        time.perf_counter() - began,
    )


def _lost_scales(path: Path, state: Mapping[str, BoxedTensor], mesh: Mesh) -> set[str]:
    """What cannot be taken up: another recipe's run has none, or histories of another length."""
    wanted = {name: tensor.global_shape for name, tensor in state.items() if name.startswith(FP8)}
    stored = on_rank_0(
        mesh,
        lambda: {n: s for n, s in store.StateReader(path).shapes.items() if n.startswith(FP8)},
        f"cannot resume from {path}",
    )
    return {name for name, shape in wanted.items() if stored.get(name) != shape}


def _changes(config: Config, before: Any, recalibrates: bool) -> list[str]:
    now = precision_of(config)
    changes = [
        f"{name} was {before[name]} and is now {value}: the loss may step a little"
        for name, value in now.items()
        if isinstance(before, dict) and before.get(name, value) != value
    ]
    if recalibrates:
        changes.append(
            "the checkpoint has no such scales as precision.fp8_recipe = delayed wants: they begin "
            "at 1 and settle within the first steps"
        )
    return changes


def _read_record(path: Path) -> dict[str, Any]:
    """``trainer.json``, with what a resumed run cannot do without."""
    record = store.read_extra(path)
    wanted = {"step": int, "optimizer_updates": int, "run": dict, "lineage": dict}
    wrong = [key for key, kind in wanted.items() if not isinstance(record.get(key), kind)]
    if not wrong and not isinstance(record["lineage"].get("parents"), list):
        wrong = ["lineage.parents"]
    if wrong:
        raise CheckpointError(
            f"{path / 'trainer.json'} does not say {', '.join(wrong)}: it is of another version or "
            "holds weights only; start a new run from it with model.init_from"
        )
    return record
