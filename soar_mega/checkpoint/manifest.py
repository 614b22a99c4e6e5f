"""``manifest.json``: the files of a checkpoint with sizes and hashes, written last.

A folder with a manifest is committed: everything the manifest names was on the disk before it. The
hashes are of what was meant to be written, made while it was, so they find what a disk, a network
or a person did to the files since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.checkpoint.errors import CheckpointError, listing
from soar_mega.checkpoint.hashing import hash_file, new_hash
from soar_mega.checkpoint.state_files import INDEX
from soar_mega.checkpoint.synced import write_json

MANIFEST = "manifest.json"
TRAINER = "trainer.json"
_READERS = 4


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint consists of.

    Attributes:
        algorithm: Of the hashes.
        files: Name -> (bytes, hash).
    """

    algorithm: str
    files: dict[str, tuple[int, str]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def write_manifest(
    folder: Path, step: int, files: Mapping[str, tuple[int, str]], algorithm: str
) -> None:
    """Write the manifest of a folder whose files are all there and synced."""
    entries = {name: {"size": size, "hash": found} for name, (size, found) in sorted(files.items())}
    content = {"format": 1, "step": step, "algorithm": algorithm, "files": entries}
    write_json(folder / MANIFEST, {**content, "own_hash": _own_hash(content)})


def _own_hash(content: Mapping[str, Any]) -> str:
    """Of the manifest itself: else its damage would be blamed on a file it names."""
    found = new_hash(content["algorithm"])
    found.update(json.dumps(content, sort_keys=True).encode())
    return found.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: It is damaged, or leads out of the folder.
    """
    try:
        content = json.loads((path / MANIFEST).read_text())
        own = content.pop("own_hash")
        if own != _own_hash(content):
            raise ValueError("its own hash is another")
        files = {
            str(name): (int(entry["size"]), str(entry["hash"]))
            for name, entry in content["files"].items()
        }
        if not {TRAINER, f"state/{INDEX}"} <= files.keys():
            raise ValueError(f"it does not name {TRAINER} and state/{INDEX}")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("it names files outside of the checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}") from error
    return Manifest(content["algorithm"], files)


def identity(path: Path) -> str:
    """Hash of the manifest, and so of everything in the checkpoint."""
    return f"xxh3-128:{hash_file(path / MANIFEST, 'xxh3-128')}"


def check(path: Path) -> None:
    """Make sure that a folder is a committed checkpoint with all its files at full size.

    Raises:
        CheckpointError: Says what is missing.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is no committed checkpoint: it has no {MANIFEST} (a save that was "
            "interrupted, or another kind of folder)"
        )
    damage = []
    for name, (size, _) in read_manifest(path).files.items():
        found = size_of(path / name)
        if found != size:
            state = "missing" if found is None else f"{found} bytes instead of {size}"
            damage.append(f"{name}: {state}")
    if damage:
        raise CheckpointError(f"checkpoint {path} is damaged:" + listing("files", damage))


def verify(path: Path | str) -> list[str]:
    """The files of a checkpoint that have changed since it was written, all read by this process.

    Raises:
        CheckpointError: As ``check``.
    """
    check(Path(path))
    manifest = read_manifest(Path(path))
    return wrong_hashes(Path(path), manifest, manifest.files)


def wrong_hashes(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Of these files of the manifest, those with another hash, or unreadable, with the reason."""

    def problem(name: str) -> str | None:
        try:
            same = hash_file(path / name, manifest.algorithm) == manifest.files[name][1]
        except OSError as error:
            return f"{name}: {error}"
        return None if same else f"{name}: another hash"

    with ThreadPoolExecutor(_READERS) as readers:
        return [found for found in readers.map(problem, sorted(names)) if found is not None]


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if there is none, or it cannot be seen."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
