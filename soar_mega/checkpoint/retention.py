"""Which checkpoints stay."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soar_mega.checkpoint.folders import committed, set_aside, step_of
from soar_mega.checkpoint.manifest import TRAINER


@dataclass(frozen=True)
class Retention:
    """What is kept; each rule adds to the others.

    Attributes:
        last: The newest so many, at least one; None keeps all.
        every: Those of steps that this divides; None: no such rule.
        best: The one with the lowest recorded validation loss.

    The newest one that was saved after an accepted step stays in any case: one saved amid skipped
    steps may have the reason in it.
    """

    last: int | None = None
    every: int | None = None
    best: bool = False

    def kept(self, paths: Sequence[Path]) -> set[Path]:
        """Those of ``paths`` (oldest first) that stay."""
        if self.last is None:
            return set(paths)
        kept = set(paths[-max(self.last, 1) :])
        kept |= set([path for path in paths if _healthy(path)][-1:])
        if self.every is not None:
            kept |= {path for path in paths if step_of(path) % self.every == 0}
        if self.best:
            losses = {path: loss for path in paths if (loss := validation_loss(path)) is not None}
            if losses:
                kept.add(min(losses, key=lambda path: (losses[path], -step_of(path))))
        return kept


def validation_loss(path: Path) -> float | None:
    """The validation loss recorded in a checkpoint, if it is a number."""
    try:
        loss = json.loads((path / TRAINER).read_text()).get("validation_loss")
    except (OSError, ValueError, AttributeError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def _healthy(path: Path) -> bool:
    try:
        health = json.loads((path / TRAINER).read_text()).get("health")
        return health is None or health.get("skipped_in_a_row") == 0
    except (OSError, ValueError, AttributeError):
        return False


def retain(root: Path, retention: Retention) -> list[str]:
    """Delete what does not stay, after a newer checkpoint was committed.

    Renamed first, so that none is half there. A folder that cannot be deleted stays.

    Returns:
        What could not be deleted and why.
    """
    if retention.last is None:
        return []
    paths = committed(root)
    kept = retention.kept(paths)
    doomed = [path for path in paths if path not in kept]
    newest = step_of(paths[-1]) if paths else -1
    doomed += [path for step, path in set_aside(root) if step <= newest]
    problems = []
    for path in doomed:
        try:
            leaving = path.rename(path.with_name(path.name + ".deleting"))
            shutil.rmtree(leaving)
        except OSError as error:
            problems.append(f"the old checkpoint {path} could not be deleted: {error}")
    return problems
