"""What a run's checkpoint holds, and saving it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from soar_mega import hub
from soar_mega.backends.te.scaling import scaling_state
from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import Box, BoxedTensor
from soar_mega.checkpoint.checkpointer import Checkpointer
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.folders import folder_of
from soar_mega.checkpoint.retention import Retention
from soar_mega.config import Config
from soar_mega.training.step import Stepper

CHECKPOINTS = "checkpoints"
FP8 = "fp8."
_POSITION = "patch_embed.position"


def checkpoints_of(config: Config) -> Path:
    """Folder of the run's checkpoints."""
    return Path(config.run.dir) / CHECKPOINTS


def state_of(stepper: Stepper) -> dict[str, BoxedTensor]:
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
    return pieces | _fp8_state(stepper)


def _fp8_state(stepper: Stepper) -> dict[str, BoxedTensor]:
    """Of delayed scaling, where that is used: a flat tensor for each linear, equal on its ranks."""
    if stepper.config.precision.recipe != "delayed":
        return {}
    mesh, found = stepper.mesh, {}
    for stage in stepper.stages:
        for name, parts in scaling_state(dict(stage.named_modules())).items():
            starts = [0, *itertools.accumulate(part.numel() for part in parts)]
            boxes = [
                Box((start,), tuple(part.shape), part)
                for start, part in zip(starts, parts, strict=False)
            ]
            found[FP8 + name] = BoxedTensor(
                (starts[-1],), boxes, contribute=mesh.data_rank == mesh.tensor_rank == 0
            )
    return found


class Saver:
    """Saves a run's checkpoints; every rank makes one and calls it at the same steps.

    Args:
        stepper: Whose state is saved.
        lineage: Where the starting weights come from: the record's ``parents``.
        data_fingerprint: Of the training data.
        data_state: Gives where its order stands.

    Attributes:
        slowest_s: Seconds from the call to the committed files, of the slowest save so far.
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
        self.slowest_s = 0.0
        self._failures = 0
        self._notes: list[str] = []
        self._stalls: dict[Path, float] = {}

    def save(self, step: int, validation_loss: float | None = None) -> None:
        """Save the state after ``step`` steps.

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
                step, state_of(self._stepper), self._record(step, validation_loss)
            )
        except CheckpointError as error:
            self._survive(error)
        self._stalls[folder_of(self._checkpointer.root, step)] = time.perf_counter() - began

    def _record(self, step: int, validation_loss: float | None) -> dict[str, Any]:
        config = self._config
        return {
            "step": step,
            "optimizer_updates": self._stepper.optimizer.step,
            "model": {
                "pretrained": hub.recorded(config.model.source),
                "transformer": self._stepper.architecture.to_diffusers(),
                "max_sequence_length": config.data.max_sequence_length,
            },
            "run": identity_of(config, self._data_fingerprint),
            "precision": precision_of(config),
            "data": dict(self._data_state()),
            "health": self._stepper.health.state(),
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
            stall = self._stalls.pop(saved.path, 0.0)
            self.slowest_s = max(self.slowest_s, stall + saved.seconds)
            self._notes.append(
                f"checkpoint: {saved.path} (written in {saved.seconds:.1f} s, training stood still "
                f"for {stall:.2f} s)"
            )
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


def precision_of(config: Config) -> dict[str, Any]:
    """What a run's numbers hang on and a resumed one may change."""
    return {
        "precision.backend": config.precision.backend,
        "precision.fp8_recipe": config.precision.recipe or "none",
        "precision.compute_dtype": config.precision.compute_dtype,
    }


def identity_of(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What must not change within a run, because sample order and draws hang on it."""
    return {
        "run.seed": config.run.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "objective.name": config.objective.name,
        "data.shards": data_fingerprint,
        "data.shuffle_shards": config.data.shuffle_shards,
    }
