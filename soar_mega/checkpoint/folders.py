"""Checkpoint folders by name: which are committed, which is newest, which one a person means.

A folder ``step-00000003`` with a ``manifest.json`` is committed. Every other name (``.tmp``: being
written or interrupted; ``.deleting``: on its way out; ``.superseded-<n>``: of steps that a resumed
run does again) is never looked at, but for ``.replaced``, which is put back where its successor
never came.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from soar_mega.checkpoint.agree import on_rank_0
from soar_mega.checkpoint.errors import CheckpointError, listing
from soar_mega.parallel.mesh import Mesh

_NAME = re.compile(r"step-(\d{8,})")


def check(path: Path) -> None:
    """Make sure that a folder is a committed checkpoint with all its files at full size.

    Raises:
        CheckpointError: Says what is missing; names a run folder's newest checkpoint if given one.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if not (path / "manifest.json").is_file():
        inside = [latest(path), latest(path / "checkpoints")]
        hint = next((f"; did you mean {found}?" for found in inside if found), "")
        raise CheckpointError(
            f"{path} is no committed checkpoint: it has no manifest.json (a save that was "
            f"interrupted, or another kind of folder){hint}"
        )
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        files = {name: {"size": int(entry["size"])} for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} is damaged: {error!r}") from error
    damage = []
    for name, entry in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != entry["size"]:
            state = "missing" if found is None else f"{found} bytes instead of {entry['size']}"
            damage.append(f"{name}: {state}")
    if damage:
        raise CheckpointError(f"checkpoint {path} is damaged:" + listing("files", damage))


def committed(root: Path | str) -> list[Path]:
    """The committed checkpoints under ``root``, oldest step first; other names are ignored."""
    found = []
    if Path(root).is_dir():
        for path in Path(root).iterdir():
            match = _NAME.fullmatch(path.name)
            if match and (path / "manifest.json").is_file():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def latest(root: Path | str) -> Path | None:
    """The committed checkpoint with the highest step, or None."""
    return next(reversed(committed(root)), None)


def resolve(resume: str, root: Path | str, mesh: Mesh) -> Path | None:
    """What ``checkpoint.resume`` means here; the same answer on every rank.

    Args:
        resume: ``none``, ``latest`` or a checkpoint's path.
        root: Folder of the run's checkpoints.
        mesh: This process among all.

    Returns:
        The checkpoint, or None: start fresh (``none``, or ``latest`` with nothing there).

    Raises:
        CheckpointError: An explicit path that is missing, uncommitted or incomplete.
    """

    def decide() -> str | None:
        _put_back(Path(root))
        if resume == "none":
            return None
        path = latest(root) if resume == "latest" else Path(resume)
        if path is not None:
            check(path)
        return None if path is None else str(path)

    found = on_rank_0(mesh, decide, f"checkpoint.resume={resume}")
    return None if found is None else Path(found)


def find(path: Path | str) -> Path:
    """The checkpoint a person means by a checkpoint's path, or a run's (its newest one).

    Raises:
        CheckpointError: There is none.
    """
    given = Path(path)
    for found in (latest(given), latest(given / "checkpoints")):
        if found is not None:
            return found
    check(given)
    return given


def replace(temporary: Path, final: Path) -> None:
    """Give a completely written folder its final name; an older folder of that name goes."""
    aside = final.with_name(final.name + ".replaced")
    if aside.exists():
        shutil.rmtree(aside)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if aside.exists():
        shutil.rmtree(aside)


def _put_back(root: Path) -> None:
    """A kill between the two renames of ``replace`` left the old folder under another name."""
    for aside in root.glob("step-*.replaced"):
        final = aside.with_suffix("")
        if not final.exists():
            aside.rename(final)


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Rename committed checkpoints of steps after ``step``; returns their new names, oldest first.

    A run that resumes at ``step`` does those steps again: left alone, the old ones would count as
    the newest.
    """
    renamed = []
    for path in committed(root):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) > step:
            number = 1
            while (target := path.with_name(f"{path.name}.superseded-{number}")).exists():
                number += 1
            renamed.append(path.rename(target))
    return renamed


def retain(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` (at least one); renamed first, so none is half there."""
    for path in committed(root)[: -max(keep, 1)]:
        doomed = path.with_name(path.name + ".deleting")
        path.rename(doomed)
        shutil.rmtree(doomed)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write and sync a JSON file.

    Raises:
        CheckpointError: The content is not plain JSON.
    """
    try:
        text = json.dumps(content, indent=2) + "\n"
    except TypeError as error:
        raise CheckpointError(f"{path.name} takes plain JSON only: {error}") from error
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
