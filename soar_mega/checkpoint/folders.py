"""Checkpoint folders by name: which are committed, which is newest, what else lies there.

A folder ``step-00000003`` with a manifest is committed. Every other name is never chosen:

- ``.tmp``: being written, or of a save that was interrupted; the next save removes it;
- ``.replaced``: an older checkpoint of the same step, put back where its successor never came;
- ``.deleting``: on its way out; the next save removes it;
- ``.superseded-<n>``: of steps that a resumed run does again;
- ``.damaged-<n>``: one that a resumed run passed over.

The last two are removed by retention once a checkpoint of that step or a later one is committed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.manifest import MANIFEST, check
from soar_mega.checkpoint.synced import sync_folder

_NAME = re.compile(r"step-(\d{8,})")
_SET_ASIDE = re.compile(r"step-(\d{8,})\.(?:superseded|damaged)-\d+")


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a committed checkpoint's folder."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def committed(root: Path | str) -> list[Path]:
    """The committed checkpoints under ``root``, oldest step first; other names are ignored."""
    found = []
    if Path(root).is_dir():
        for path in Path(root).iterdir():
            if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file():
                found.append((step_of(path), path))
    return [path for _, path in sorted(found)]


def latest(root: Path | str) -> Path | None:
    """The committed checkpoint with the highest step, or None; its content is not looked at."""
    return next(reversed(committed(root)), None)


def set_aside(root: Path) -> list[tuple[int, Path]]:
    """Superseded and damaged checkpoints, with their steps."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _SET_ASIDE.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def ignored(root: Path) -> list[str]:
    """Names under ``root`` that are neither committed nor set aside."""
    if not root.is_dir():
        return []
    known = {*committed(root), *(path for _, path in set_aside(root))}
    return sorted(path.name for path in root.iterdir() if path not in known)


def find(path: Path | str) -> Path:
    """The checkpoint a person means by a checkpoint's path, or a run's (its newest one).

    Raises:
        CheckpointError: There is none.
    """
    given = Path(path)
    for found in (latest(given), latest(given / "checkpoints")):
        if found is not None:
            return found
    check_or_hint(given)
    return given


def replace(temporary: Path, final: Path) -> None:
    """Give a completely written folder its final name; an older folder of that name goes."""
    aside = final.with_name(final.name + ".replaced")
    if aside.exists():
        shutil.rmtree(aside)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def put_back(root: Path) -> None:
    """A kill between the two renames of ``replace`` left the old folder under another name."""
    for aside in root.glob("step-*.replaced"):
        final = aside.with_suffix("")
        if not final.exists():
            aside.rename(final)


def clear_interrupted(root: Path) -> None:
    """Remove what interrupted saves and deletions left."""
    for pattern in ("step-*.tmp", "step-*.deleting", "step-*.replaced"):
        for left in root.glob(pattern):
            if pattern != "step-*.replaced" or left.with_suffix("").exists():
                shutil.rmtree(left, ignore_errors=True)


def set_aside_after(root: Path, step: int, damaged: Collection[Path] = ()) -> list[Path]:
    """Rename committed checkpoints of steps after ``step``; returns their new names, oldest first.

    A run that resumes at ``step`` does those steps again: left alone, the old ones would count as
    the newest.
    """
    renamed = []
    for path in committed(root):
        if step_of(path) > step:
            kind, number = "damaged" if path in damaged else "superseded", 1
            while (target := path.with_name(f"{path.name}.{kind}-{number}")).exists():
                number += 1
            renamed.append(path.rename(target))
    return renamed


def hint(path: Path) -> str:
    """What a person may have meant by a folder that is no checkpoint; empty if nothing."""
    inside = [latest(path), latest(path / "checkpoints")]
    return next((f"; did you mean {found}?" for found in inside if found), "")


def check_or_hint(path: Path) -> None:
    """``check``, naming a run folder's newest checkpoint if given one.

    Raises:
        CheckpointError: As ``check``.
    """
    try:
        check(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{hint(path)}") from None
