"""Reads index files, which may be damaged, of another tar, or lie."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from soar_mega.data.errors import DataError
from soar_mega.data.shards.remote import index_name, shown
from soar_mega.data.shards.scan import CAPTION_EXTENSIONS, usable_name
from soar_mega.data.shards.shard import (
    CAPTION_KIND,
    CAPTION_OFFSET,
    CAPTION_SIZE,
    DATA_OFFSET,
    DATA_SIZE,
    HEIGHT,
    NO_CAPTION,
    WIDTH,
    Shard,
)

INDEX_VERSION = 1
MAX_SIDE = 2**26  # pixels; no decoder of ours takes as many in a whole picture


def read_index_file(path: str, data: bytes, size: int | None) -> Shard:
    """A shard as its index file says.

    Args:
        path: Of the tar.
        data: The index file.
        size: Length of the tar in bytes, where known.

    Raises:
        DataError: The index is damaged, of another tar, or claims what no tar can be.
    """
    fix = "Make it again with the tool that wrote it, or delete it to have the tar scanned."
    name = shown(index_name(path))
    try:
        record = json.loads(data)
        version, indexed = record["version"], record["size"]
        encoded = record.get("kind", "images") == "encoded"
        keys: list[str] = []
        rows: list[tuple[int, ...]] = []
        for sample in record["samples"]:
            key, place = sample["key"], sample["payload" if encoded else "image"]
            caption, kind = sample["caption"] or (0, 0), _caption_kind(sample)
            row = (*place, *caption, kind, sample["width"], sample["height"])
            # numpy would take "12", 1.5 and true for numbers.
            if len(place) != 2 or len(row) != 7 or any(type(value) is not int for value in row):
                raise ValueError(f"numbers of key {key!r}")
            if not (isinstance(key, str) and usable_name(key)):
                raise ValueError(f"key {key!r}")
            keys.append(key)
            rows.append(row)
        table = np.array(rows, dtype=np.int64).reshape(len(rows), 7)
        left_out = dict(record.get("ignored", {}))
        ignored = Counter({str(name): int(number) for name, number in left_out.items()})
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"{name}: damaged index ({repr(error)[:500]}). {fix}") from error
    if version != INDEX_VERSION:
        raise DataError(f"{name}: version {version!r:.100}; this is version {INDEX_VERSION}. {fix}")
    if type(indexed) is not int or indexed < 0 or (size is not None and indexed != size):
        raise DataError(
            f"{name}: stale: it is of a tar of {indexed!r:.100} bytes, but {shown(path)} has "
            f"{'unknown' if size is None else size}. {fix}"
        )
    fault = _fault(table, indexed, keys)
    if fault:
        raise DataError(f"{name}: damaged index: {fault}. {fix}")
    return Shard(path, indexed, keys, table, ignored, encoded)


def _fault(table: np.ndarray, size: int, keys: list[str]) -> str:
    """What an index claims that no tar can be; empty where all is well."""
    if len(set(keys)) != len(keys):
        return "keys twice"
    starts = table[:, [DATA_OFFSET, CAPTION_OFFSET]].ravel()
    sizes = table[:, [DATA_SIZE, CAPTION_SIZE]].ravel()
    # Each bounded on its own first: the sum of two huge numbers wraps round.
    outside = (starts > size) | (sizes > size) | (starts + sizes > size)
    if (np.delete(table, CAPTION_KIND, axis=1) < 0).any() or outside.any():
        return "members outside the tar"
    starts, ends = starts[sizes > 0], (starts + sizes)[sizes > 0]
    order = np.argsort(starts)
    if (starts[order][1:] < ends[order][:-1]).any():
        return "members that overlap"
    if (table[:, [WIDTH, HEIGHT]] > MAX_SIDE).any():
        return f"pictures of more than {MAX_SIDE} pixels a side"
    return ""


def _caption_kind(sample: dict[str, Any]) -> int:
    if sample["caption"] is None:
        return NO_CAPTION
    return CAPTION_EXTENSIONS.index(sample.get("caption_extension", "txt"))
