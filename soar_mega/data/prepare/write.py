"""Writes one planned shard and its index: the same bytes whenever it is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.prepare.check import Checked, read_caption, read_part
from soar_mega.data.prepare.sources import Candidate
from soar_mega.data.shards.index import scan_shard
from soar_mega.data.shards.write_index import IndexedPicture, index_path, replacing, write_index

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_NAME_LENGTH = 60  # a tar header holds names of 100 bytes


@dataclass(frozen=True)
class ShardJob:
    """The samples of one shard; ``first`` is the number of its first one among all."""

    path: Path
    first: int
    samples: list[tuple[Candidate, Checked]]


def key_of(number: int, name: str) -> str:
    """A sample's key, unique by its number: letters, digits, ``-`` and ``_`` of the name follow."""
    return f"{number:08d}-{_UNSAFE.sub('_', name)[:_NAME_LENGTH]}"


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
    pictures = [
        IndexedPicture(checked.width, checked.height, checked.sha256, candidate.source)
        for candidate, checked in job.samples
    ]
    write_index(job.path, shard, pictures)
    return len(keys)


def _members(candidate: Candidate, checked: Checked) -> dict[str, bytes]:
    part = candidate.image
    assert part is not None
    image = _unchanged(candidate, checked.sha256, lambda: read_part(part))
    caption = _unchanged(candidate, checked.caption_sha256, lambda: read_caption(candidate))
    return {checked.extension: image, "txt": caption}


def _unchanged(candidate: Candidate, sha256: str, read: Callable[[], bytes]) -> bytes:
    try:
        data: bytes | None = read()
    except BadSampleError:
        data = None
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(
            f"{candidate.source}: its image or caption has changed since it was checked. Leave the "
            "input alone while it is prepared; start again with an empty --out."
        )
    return data
