"""Writes one planned shard and its index: the same bytes whenever it is written."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from soar_mega.data.errors import DataError
from soar_mega.data.prepare.check import Checked, RefusedError, read_caption, read_part
from soar_mega.data.prepare.sources import Candidate
from soar_mega.data.shards.index import INDEX_VERSION, Shard, scan_shard

PARTIAL = ".partial"
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_NAME_LENGTH = 60  # a tar header holds names of 100 bytes


@dataclass(frozen=True)
class ShardJob:
    """The samples of one shard; ``first`` is the number of its first one among all."""

    path: Path
    first: int
    samples: list[tuple[Candidate, Checked]]


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(shard.name + ".index.json")


def key_of(number: int, name: str) -> str:
    """A sample's key, unique by its number: letters, digits, ``-`` and ``_`` of the name follow."""
    return f"{number:08d}-{_UNSAFE.sub('_', name)[:_NAME_LENGTH]}"


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


def is_complete(shard: Path) -> bool:
    """Whether the shard and its index are there: the index comes last."""
    try:
        size = json.loads(index_path(shard).read_bytes())["size"]
        return bool(shard.stat().st_size == size)
    except FileNotFoundError:
        return False


def write_shard(job: ShardJob) -> int:
    """Write the tar and its index; returns the number of samples.

    Raises:
        DataError: An image or caption is no longer what was checked.
        OSError: The disk is full, or a source cannot be read.
    """
    import webdataset

    keys: list[str] = []
    with replacing(job.path) as file:
        # encoder=False: bytes go in as they are. Owners and times are fixed.
        with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for number, (candidate, checked) in enumerate(job.samples, job.first):
                keys.append(key_of(number, candidate.name))
                tar.write({"__key__": keys[-1], **_members(candidate, checked)})
        file.flush()
        shard = scan_shard(file.name)  # what the trainer will see
        if shard.keys != keys:
            raise DataError(f"{job.path}: does not read back as written; a fault of this program.")
    with replacing(index_path(job.path)) as file:
        file.write(dump(_index(job, shard)))
    return len(keys)


def dump(value: object) -> bytes:
    """JSON in ASCII, so that names of any bytes survive."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _members(candidate: Candidate, checked: Checked) -> dict[str, bytes]:
    part = candidate.image
    assert part is not None
    image = _unchanged(candidate, checked.sha256, lambda: read_part(part))
    caption = _unchanged(candidate, checked.caption_sha256, lambda: read_caption(candidate))
    return {checked.extension: image, "txt": caption}


def _unchanged(candidate: Candidate, sha256: str, read: Callable[[], bytes]) -> bytes:
    try:
        data: bytes | None = read()
    except RefusedError:
        data = None
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(
            f"{candidate.source}: its image or caption has changed since it was checked. Leave the "
            "input alone while it is prepared; start again with an empty --out."
        )
    return data


def _index(job: ShardJob, shard: Shard) -> dict[str, Any]:
    samples = [
        {
            "key": key,
            "image": row[:2],
            "caption": row[2:4],
            "width": checked.width,
            "height": checked.height,
            "sha256": checked.sha256,
            "source": candidate.source,
        }
        for key, row, (candidate, checked) in zip(
            shard.keys, shard.table.tolist(), job.samples, strict=True
        )
    ]
    name = job.path.name
    return {"version": INDEX_VERSION, "shard": name, "size": shard.size, "samples": samples}
