"""What a run's checkpoint holds, saving it, and taking a run up from one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from soar_mega.checkpoint import store
from soar_mega.checkpoint.agree import on_rank_0
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.checkpointer import Checkpointer
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.retention import Retention
from soar_mega.checkpoint.selection import Selection, select
from soar_mega.config import Config, ConfigError
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.step import Stepper

CHECKPOINTS = "checkpoints"
_POSITION = "patch_embed.position"


def checkpoints_of(config: Config) -> Path:
    """Folder of the run's checkpoints."""
    return Path(config.run.dir) / CHECKPOINTS


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
            pieces[store.MODEL + _POSITION] = BoxedTensor.whole(
                table, contribute=first, constant=True
            )
    return pieces


class Saver:
    """Saves a run's checkpoints; every rank makes one and calls it at the same steps.

    Args:
        stepper: Whose state is saved.
        lineage: Where the starting weights come from: the record's ``parents``.
        data_fingerprint: Of the training data.
        data_state: Gives where its order stands.
    """

    def __init__(
        self,
        stepper: Stepper,
        lineage: list[dict[str, Any]],
        data_fingerprint: str,
        data_state: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._stepper, self._config = stepper, stepper.config
        self._lineage, self._data_state = lineage, data_state
        self._data_fingerprint = data_fingerprint
        settings = self._config.checkpoint
        self._checkpointer = Checkpointer(
            checkpoints_of(self._config),
            stepper.mesh,
            Retention(
                settings.checkpoints_total_limit, settings.keep_every_steps, settings.keep_best
            ),
            settings.hash_algorithm,
            settings.async_save,
        )
        self._failures = 0
        self._notes: list[str] = []
        self._stall: tuple[int, float] = (0, 0.0)

    def save(self, step: int, validation_loss: float | None = None) -> float:
        """Save the state after ``step`` steps; returns for how many seconds training stood still.

        Args:
            validation_loss: Of this step, where it was measured.

        Raises:
            CheckpointError: On every rank: more saves in a row failed than
                ``checkpoint.max_failed_saves`` allows.
        """
        began = time.perf_counter()
        self.settle()
        try:
            self._checkpointer.save(
                step, _tensors(self._stepper), self._record(step, validation_loss)
            )
        except CheckpointError as error:
            self._survive(error)
        self._stall = step, time.perf_counter() - began
        return self._stall[1]

    def _record(self, step: int, validation_loss: float | None) -> dict[str, Any]:
        config = self._config
        return {
            "step": step,
            "optimizer_updates": self._stepper.optimizer.step,
            "model": {
                # Absolute, so that converters find it from any working directory.
                "pretrained": str(Path(config.model.pretrained).resolve()),
                "transformer": self._stepper.architecture.to_diffusers(),
                "max_sequence_length": config.data.max_sequence_length,
            },
            "run": _identity(config, self._data_fingerprint),
            "data": dict(self._data_state()),
            "validation_loss": validation_loss,
            "lineage": {
                "run": config.run.name or Path(config.run.dir).name,
                "step": step,
                "objective": config.objective.name,
                "parents": self._lineage,
            },
        }

    @property
    def failed(self) -> bool:
        """Whether a save in the background failed on this rank since the last ``settle``."""
        return self._checkpointer.failed

    def settle(self) -> None:
        """Wait for the save under way; every rank calls it.

        Raises:
            CheckpointError: As ``save``.
        """
        try:
            self._checkpointer.settle()
        except CheckpointError as error:
            self._survive(error)

    def _survive(self, error: CheckpointError) -> None:
        limit = self._config.checkpoint.max_failed_saves
        self._failures += 1
        if self._failures > limit:
            raise error
        self._notes.append(
            f"checkpoint not saved ({self._failures} in a row, checkpoint.max_failed_saves = "
            f"{limit}), training goes on: {error}"
        )

    def notes(self) -> list[str]:
        """What there is to tell since the last call: committed checkpoints, failures survived."""
        for saved in self._checkpointer.finished():
            self._failures = 0
            self._notes.append(f"checkpoint: {saved.path} ({saved.seconds:.1f} s)")
            self._notes += saved.problems
        notes, self._notes = self._notes, []
        return notes

    def finish(self) -> None:
        """Wait for the last save; every rank calls it.

        Raises:
            CheckpointError: On every rank, if it failed: nothing will try again.
        """
        self._checkpointer.settle()

    def join(self) -> None:
        """Wait for the save under way, without the others; for the way out after an error."""
        self._checkpointer.join()


def _identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What must not change within a run, because sample order and draws hang on it."""
    return {
        "run.seed": config.run.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "objective.name": config.objective.name,
        "data.shards": data_fingerprint,
        "data.shuffle_shards": config.data.shuffle_shards,
    }


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
        set_aside: Later checkpoints of the run, under their new names.
        seconds: It took to read the state.
    """

    path: Path
    steps: int
    lineage: list[dict[str, Any]]
    data: Any
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
    for name, value in _identity(stepper.config, data_fingerprint).items():
        before = recorded["run"].get(name)
        if before != value:
            raise ConfigError(
                f"checkpoint.resume = {path}: {name} was {before!r} and is now {value!r}: put it "
                "back, or start a new run with model.init_from"
            )
    store.load(path, _tensors(stepper), mesh)
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
        moved,
        time.perf_counter() - began,
    )


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
