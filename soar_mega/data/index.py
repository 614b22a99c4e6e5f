"""Which samples lie where in a set of tar shards, found by reading member headers only.

A shard is an uncompressed tar in the WebDataset layout: members named ``KEY.EXT`` (the key ends at
the first dot of the file name), where a sample is one image (jpg, jpeg, png, webp) and one caption
(txt, or json with a ``caption`` string; txt wins where both exist). Members are never extracted:
a scan keeps offsets and sizes, and ``ShardIndex`` reads single members by position.

``scan_members``, under ``scan_shard``, is the only function that looks inside a tar: whatever else
can produce a ``Shard`` (an index file next to the tar, for example) can take its place.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json")  # in order of preference
MAX_IMAGE_BYTES = 2**28
MAX_CAPTION_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
_BLOCK, _TAIL = 512, 2**16  # of the tail, this much is looked at; writers pad to 10 KiB
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# Columns of Shard.table.
_IMAGE_OFFSET, _IMAGE_SIZE, _CAPTION_OFFSET, _CAPTION_SIZE, _CAPTION_KIND = range(5)


class DataError(ValueError):
    """Training data that cannot be used; the message names what, where, the rule and the fix."""


@dataclass(frozen=True)
class Shard:
    """The samples of one tar, in the order in which their keys appear.

    Attributes:
        path: Where the tar lies.
        size: Its length in bytes.
        keys: Sample keys, unique within the shard.
        table: int64 (len(keys), 5): image offset and size, caption offset and size (bytes, of the
            member's data), and the caption's place in ``CAPTION_EXTENSIONS``.
        ignored: How many members were left out, by reason.
    """

    path: str
    size: int
    keys: list[str]
    table: np.ndarray
    ignored: Counter[str]

    def where(self, row: int) -> str:
        """A sample's place in words, for messages."""
        return f"{self.path}, key {self.keys[row]!r}"


class ShardIndex:
    """All samples of a list of shards, numbered from 0 in shard order.

    Any thread may read.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._ends = np.cumsum([len(shard.keys) for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _locate(self, sample: int) -> tuple[Shard, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of an index of {len(self)}")
        number = int(np.searchsorted(self._ends, sample, side="right"))
        shard = self.shards[number]
        return shard, sample - int(self._ends[number]) + len(shard.keys)

    def key(self, sample: int) -> str:
        """The sample's key within its shard."""
        shard, row = self._locate(sample)
        return shard.keys[row]

    def where(self, sample: int) -> str:
        """The sample's place in words, for messages."""
        shard, row = self._locate(sample)
        return shard.where(row)

    def read_image(self, sample: int) -> bytes:
        """The image member's bytes.

        Raises:
            DataError: The shard cannot be read or has become shorter.
        """
        shard, row = self._locate(sample)
        return _read(shard, row, _IMAGE_OFFSET)

    def read_caption(self, sample: int) -> str:
        """The caption, without surrounding white space.

        Raises:
            DataError: The shard cannot be read, the text is not UTF-8, or the json has no caption.
        """
        shard, row = self._locate(sample)
        return _read_caption(shard, row)

    def fingerprint(self) -> str:
        """sha256 (hex) of shard file names, lengths and sample keys, in order.

        Folders are left out, so data that moved as a whole keeps its fingerprint.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            head = [os.path.basename(shard.path), shard.size, shard.keys]
            digest.update(json.dumps(head, separators=(",", ":")).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def ignored(self) -> Counter[str]:
        """How many members of all shards belong to no sample, by reason."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.ignored)
        return total


def build_index(
    shards: str | Sequence[str], *, setting: str = "data.shards", num_threads: int = 8
) -> ShardIndex:
    """Scan the shards that ``shards`` names.

    Args:
        shards: Path, glob or brace pattern (``train-{000..015}.tar``, ``{a,b}/*.tar``), or a list
            of those. Order: the list's; the braces'; sorted within a glob.
        setting: The config key to name in errors.
        num_threads: How many shards are scanned at once.

    Raises:
        DataError: No shard matches, a shard cannot be used, or there is no sample at all.
    """
    paths = find_shards(shards, setting=setting)
    found: list[Shard] = []
    bad: list[str] = []
    with ThreadPoolExecutor(max(1, min(num_threads, len(paths)))) as pool:
        for future in [pool.submit(scan_shard, path) for path in paths]:
            try:
                found.append(future.result())
            except DataError as error:
                bad.append(str(error))
    if bad:
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"{setting}={shards!r}: {len(bad)} of {len(paths)} shards cannot be used:\n  "
            + "\n  ".join(bad[:5])
            + more
        )
    index = ShardIndex(found)
    if len(index) == 0:
        raise DataError(
            f"{setting}={shards!r}: {len(paths)} shards match but hold no sample: an image "
            f"({', '.join(IMAGE_EXTENSIONS)}) and a caption ({', '.join(CAPTION_EXTENSIONS)}) of "
            "the same key. Point the setting at shards with samples."
        )
    return index


def find_shards(shards: str | Sequence[str], *, setting: str = "data.shards") -> list[str]:
    """The files that a shard setting names, in order (see ``build_index``).

    Raises:
        DataError: A pattern matches nothing, a path is no file, or a file is named twice.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    paths: list[str] = []
    for pattern in patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise DataError(f"{setting}={pattern!r}: shards must be local files. Copy them here.")
        for path in _expand(os.path.expanduser(pattern)):
            paths.extend(_matches(path, pattern, setting))
    if not paths:
        raise DataError(f"{setting}={shards!r}: names no shard. Give a path, a glob or a list.")
    path, times = Counter(map(os.path.abspath, paths)).most_common(1)[0]
    if times > 1:
        raise DataError(f"{setting}={shards!r}: names {path} {times} times. Remove the overlap.")
    return paths


def _matches(path: str, pattern: str, setting: str) -> list[str]:
    if os.path.isfile(path):  # first, so that a real name with [ or * in it is taken as it is
        return [path]
    if os.path.isdir(path):
        raise DataError(f"{setting}={pattern!r}: {path} is a folder. Give {path + '/*.tar'!r}.")
    paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
    if not paths:
        raise DataError(
            f"{setting}={pattern!r}: no shard matches {path!r} (working directory {os.getcwd()}). "
            "Correct the path or make the shards first."
        )
    return paths


def _expand(pattern: str) -> Iterator[str]:
    """The pattern once for each choice of its braces; those without a comma or range stay."""
    opening = -1 if os.path.isfile(pattern) else pattern.find("{")
    while opening >= 0:
        depth, cuts = 0, [opening]
        for place in range(opening, len(pattern)):
            depth += {"{": 1, "}": -1}.get(pattern[place], 0)
            if pattern[place] == "," and depth == 1:
                cuts.append(place)
            if depth == 0:
                cuts.append(place)
                break
        choices = [pattern[a + 1 : b] for a, b in itertools.pairwise(cuts)] if depth == 0 else []
        span = _RANGE.fullmatch(choices[0]) if len(choices) == 1 else None
        if span:
            width = len(span[1]) if span[1].startswith("0") else 0
            choices = [f"{n:0{width}d}" for n in range(int(span[1]), int(span[2]) + 1)]
        if span or len(choices) > 1:
            for choice in choices:
                yield from _expand(pattern[:opening] + choice + pattern[cuts[-1] + 1 :])
            return
        opening = pattern.find("{", opening + 1)
    yield pattern


class _HeaderFile(io.FileIO):
    """A file that refuses large reads: a scan only ever needs headers, and an extended header may
    claim any length."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes (limit {MAX_HEADER_BYTES})")
        return super().read(size)


# Key -> extension -> (offset, size) in bytes of the member's data.
Members = dict[str, dict[str, tuple[int, int]]]


def scan_shard(path: str) -> Shard:
    """Read the member headers of one tar.

    Raises:
        DataError: The file cannot be read, is no complete uncompressed tar, has duplicate members,
            has images without captions, or has members but no image.
    """
    return _group(path, *scan_members(path))


def scan_members(path: str) -> tuple[int, Members, Counter[str]]:
    """The tar's length in bytes, its images and captions by key, and counts of what is ignored.

    Raises:
        DataError: The file cannot be read, is no complete uncompressed tar, or has duplicate
            members.
    """
    members: Members = {}
    ignored: Counter[str] = Counter()
    try:
        with _HeaderFile(path) as file:
            size = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                    _take(path, size, info, members, ignored)
                end = tar.offset
            _check_end(path, file, end, size)
    except (OSError, tarfile.TarError, UnicodeError) as error:
        raise DataError(
            f"{path}: not readable as an uncompressed tar ({error}): truncated, damaged, "
            "compressed or without permission. Write or copy it again, or take it out."
        ) from error
    return size, members, ignored


def _take(
    path: str,
    size: int,
    info: tarfile.TarInfo,
    members: Members,
    ignored: Counter[str],
) -> None:
    """Note one member, or count why not."""
    if info.isdir():
        return
    if not info.isreg() or info.issparse():
        ignored["links, devices and sparse files"] += 1
        return
    name = info.name.removeprefix("./")
    parts = name.split("/")
    stem, dot, extension = parts[-1].partition(".")
    if not stem or "" in parts or ".." in parts or not name.isprintable():
        ignored["odd names"] += 1
        return
    extension = extension.lower()
    if not dot or extension not in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS:
        ignored["other extensions"] += 1
        return
    key = "/".join([*parts[:-1], stem])
    limit = MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_CAPTION_BYTES
    if info.size > limit:
        raise DataError(f"{path}: member {name!r} has {info.size} bytes; the limit is {limit}.")
    if info.offset_data + info.size > size:
        raise DataError(
            f"{path}: truncated: member {name!r} ends at byte {info.offset_data + info.size}, the "
            f"file at {size}. Write or copy it again."
        )
    kinds = members.setdefault(key, {})
    clash = [k for k in kinds if k == extension or {k, extension} <= set(IMAGE_EXTENSIONS)]
    if clash:
        raise DataError(
            f"{path}: key {key!r} has both .{clash[0]} and .{extension} members; a key has one "
            "image and one caption of a kind. Give each sample a key of its own."
        )
    kinds[extension] = (info.offset_data, info.size)


def _check_end(path: str, file: _HeaderFile, end: int, size: int) -> None:
    """tarfile stops silently at a damaged header, a missing end mark and the first of several."""
    file.seek(end)
    tail = file.read(min(max(size - end, 0), _TAIL))
    if len(tail) < _BLOCK:
        raise DataError(
            f"{path}: truncated: no end-of-archive mark at byte {end}. Write or copy it again "
            "(a writer that is not closed leaves this)."
        )
    if any(tail[:_BLOCK]):
        raise DataError(f"{path}: damaged: byte {end} starts no member header. Write it again.")
    if any(tail):
        raise DataError(
            f"{path}: more data after the end-of-archive mark at byte {end} (tars joined with "
            "cat?). Write it again as one archive."
        )


def _group(
    path: str,
    size: int,
    members: Members,
    ignored: Counter[str],
) -> Shard:
    keys: list[str] = []
    rows: list[tuple[int, int, int, int, int]] = []
    bare: list[str] = []
    for key, kinds in members.items():
        image = next((kinds[e] for e in IMAGE_EXTENSIONS if e in kinds), None)
        caption = next((n for n, e in enumerate(CAPTION_EXTENSIONS) if e in kinds), None)
        if image is None:
            ignored["captions without image"] += len(kinds)
        elif caption is None:
            bare.append(key)
        else:
            keys.append(key)
            rows.append((*image, *kinds[CAPTION_EXTENSIONS[caption]], caption))
    if bare:
        raise DataError(
            f"{path}: {len(bare)} of {len(bare) + len(keys)} samples have no caption (first: "
            f"{bare[0]!r}); every image needs a member of the same key ending in .txt or .json. "
            "Add the captions or take the shard out of the setting."
        )
    if not keys and (members or ignored):
        counts = ", ".join(f"{number} {reason}" for reason, number in ignored.items())
        raise DataError(
            f"{path}: no sample in it ({counts}); an image must be named KEY.EXT with EXT one of "
            f"{', '.join(IMAGE_EXTENSIONS)} and no other dot in the file name."
        )
    table = np.array(rows, dtype=np.int64).reshape(len(rows), 5)
    shard = Shard(path, size, keys, table, ignored)
    # Captions in json are seen only when read: look at one, so that a set without any is found now.
    in_json = np.flatnonzero(table[:, _CAPTION_KIND] == CAPTION_EXTENSIONS.index("json"))
    if len(in_json):
        _read_caption(shard, int(in_json[0]))
    return shard


def _read(shard: Shard, row: int, column: int) -> bytes:
    offset, size = (int(value) for value in shard.table[row, column : column + 2])
    try:
        with open(shard.path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise DataError(f"{shard.where(row)}: cannot be read: {error}") from error
    if len(data) != size:
        raise DataError(
            f"{shard.where(row)}: {len(data)} of {size} bytes at {offset}; the shard changed after "
            "it was scanned. Do not write to shards that are in use."
        )
    return data


def _read_caption(shard: Shard, row: int) -> str:
    data, where = _read(shard, row, _CAPTION_OFFSET), shard.where(row)
    try:
        text = data.decode("utf-8-sig")
        if CAPTION_EXTENSIONS[shard.table[row, _CAPTION_KIND]] == "txt":
            return text.strip()
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the caption is no UTF-8 text or no json: {error}") from error
    caption = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(caption, str):
        raise DataError(f"{where}: the json has no string field 'caption'. Add it, or a .txt.")
    return caption.strip()
