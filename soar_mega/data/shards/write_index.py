"""Writes the index file that lies beside a shard: the one place that knows its fields.

``{"version", "shard", "size", "ignored", "samples"}``; of each sample ``key``, ``image`` and
``caption`` (offset and size in bytes; a caption may be null), ``caption_extension`` unless it is
txt, upright ``width`` and ``height`` in pixels (0 where the picture does not tell), ``sha256`` of
the image, and ``source``. ``ignored`` and ``source`` only where there is something to say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from soar_mega.data.shards.index_file import INDEX_VERSION
from soar_mega.data.shards.remote import INDEX_SUFFIX
from soar_mega.data.shards.scan import CAPTION_EXTENSIONS
from soar_mega.data.shards.shard import CAPTION_KIND, NO_CAPTION, Shard

PARTIAL = ".partial"


@dataclass(frozen=True)
class IndexedPicture:
    """What an index says of a picture besides its place.

    Attributes:
        width, height: Upright, in pixels; 0 where the picture does not tell.
        sha256: Of its bytes, in hex; None where they cannot be read.
        source: Where it came from, for people; empty: nothing to say.
    """

    width: int
    height: int
    sha256: str | None
    source: str = ""


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(shard.name + INDEX_SUFFIX)


@contextmanager
def replacing(path: Path, writer: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when all of it is on the disk.

    ``writer`` tells those apart that may write it at the same time; default: the process's id.
    """
    partial = path.with_name(f".{path.name}.{os.getpid() if writer is None else writer}{PARTIAL}")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def dump(value: object) -> bytes:
    """JSON in ASCII, so that names of any bytes survive."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def write_index(path: Path, shard: Shard, pictures: Sequence[IndexedPicture]) -> None:
    """Write the index of the tar at ``path``.

    Args:
        path: The tar; its index is written beside it.
        shard: As ``scan_shard`` read it, here or under another name.
        pictures: Of each sample, in order.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    record: dict[str, Any] = {"version": INDEX_VERSION, "shard": path.name, "size": shard.size}
    if shard.ignored:
        record["ignored"] = shard.ignored
    record["samples"] = [
        _sample(key, row, picture)
        for key, row, picture in zip(shard.keys, shard.table.tolist(), pictures, strict=True)
    ]
    with replacing(index_path(path)) as file:
        file.write(dump(record))


def _sample(key: str, row: list[int], picture: IndexedPicture) -> dict[str, Any]:
    kind = row[CAPTION_KIND]
    sample: dict[str, Any] = {
        "key": key,
        "image": row[:2],
        "caption": None if kind == NO_CAPTION else row[2:4],
    }
    if kind > 0:
        sample["caption_extension"] = CAPTION_EXTENSIONS[kind]
    sample |= {"width": picture.width, "height": picture.height, "sha256": picture.sha256}
    if picture.source:
        sample["source"] = picture.source
    return sample
