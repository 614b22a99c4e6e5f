"""Files of a run that a later start must not overwrite, or must not find half written."""

from __future__ import annotations

import os
from pathlib import Path


def put_aside(path: Path) -> None:
    """Rename an existing ``name.ext`` to the first free ``name.<n>.ext``, from 1."""
    if not path.exists():
        return
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it.

    Raises:
        OSError: It cannot be written; what was there before is still there.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
