"""Small files and folder entries that are on the disk when the call returns."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soar_mega.checkpoint.errors import CheckpointError


def write_text(path: Path, text: str) -> None:
    """Write and sync a file."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write and sync a JSON file.

    Raises:
        CheckpointError: The content is not plain JSON.
    """
    try:
        text = json.dumps(content, indent=2) + "\n"
    except TypeError as error:
        raise CheckpointError(f"{path.name} takes plain JSON only: {error}") from error
    write_text(path, text)


def sync_folder(path: Path) -> None:
    """Sync the entries of a folder: files made in it, and renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
