"""``starts.json``: how often the run was started from the same step and crashed.

A job that is started again by itself must not crash for ever: what crashed several times in a row
without getting any further will not mend itself.
"""

from __future__ import annotations

import json
from pathlib import Path

from soar_mega.telemetry.files import write_whole

FILE_NAME = "starts.json"


class StuckRunError(RuntimeError):
    """The run crashes from the same step again and again."""


def count_start(folder: Path, step: int, limit: int) -> str | None:
    """Count a start; one process of a run calls it.

    Args:
        folder: Of the run.
        step: Steps done by the checkpoint it goes on from.
        limit: Crashes from one step that are enough.

    Returns:
        Why it must not start, or None.
    """
    path = folder / FILE_NAME
    crashes = 0
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["step"] == step:
            crashes = int(record["starts"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):  # half written by a dying machine: count anew
        crashes = 0
    if crashes >= limit:
        return (
            f"the run crashed {crashes} times in a row without getting past step {step} "
            f"(train.max_starts_without_progress = {limit}), so it is not started again. Look at "
            f"the ends of the logs of those starts; when the cause is gone, remove {path}"
        )
    write_whole(path, json.dumps({"step": step, "starts": crashes + 1}) + "\n")
    return None


def forget_starts(folder: Path) -> None:
    """The run ended as it should: what was counted does not matter any more."""
    (folder / FILE_NAME).unlink(missing_ok=True)
