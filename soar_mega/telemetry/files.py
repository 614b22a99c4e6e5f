"""Files of a run that a later start must not overwrite."""

from __future__ import annotations

from pathlib import Path


def put_aside(path: Path) -> None:
    """Rename an existing ``name.ext`` to the first free ``name.<n>.ext``, from 1."""
    if not path.exists():
        return
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
