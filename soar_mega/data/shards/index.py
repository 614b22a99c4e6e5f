"""Which samples lie where in a set of tar shards.

A shard is an uncompressed tar in the WebDataset layout: members named ``KEY.EXT`` (the key ends at
the first dot of the file name), where a sample is one image (jpg, jpeg, png, webp) and one caption
(txt, or json with a ``caption`` string; txt wins where both exist); or, in encoded sets, one
payload. An index file beside the shard, ``SHARD.index.json``, says the same without a look inside,
and the pictures' sizes too; ``tools/prepare_data.py`` writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.files import ShardFiles
from soar_mega.data.shards.patterns import find_shards
from soar_mega.data.shards.scan import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, ScannedTar, scan_tar

MAX_IMAGE_BYTES = 2**28
MAX_CAPTION_BYTES = 2**20
INDEX_VERSION = 1
# Columns of Shard.table.
DATA_OFFSET, DATA_SIZE, CAPTION_OFFSET, CAPTION_SIZE, CAPTION_KIND, WIDTH, HEIGHT = range(7)
NO_CAPTION = -1


@dataclass(frozen=True)
class Shard:
    """The samples of one tar, in the order in which their keys appear.

    Attributes:
        path: Where the tar lies.
        size: Its length in bytes.
        keys: Sample keys, unique within the shard.
        table: int64 (len(keys), 7): offset and size in bytes of the picture's (or payload's) data,
            of the caption's, the caption's place in ``CAPTION_EXTENSIONS`` or ``NO_CAPTION``, and
            the picture's upright width and height in pixels, 0 where unknown.
        ignored: How many members were left out, by reason.
        encoded: Its samples are payloads of an encoded set, not pictures.
    """

    path: str
    size: int
    keys: list[str]
    table: np.ndarray
    ignored: Counter[str]
    encoded: bool = False

    def where(self, row: int) -> str:
        """A sample's place in words, for messages."""
        return f"{self.path}, key {self.keys[row]!r}"


class ShardIndex:
    """All samples of a list of shards, numbered from 0 in shard order.

    Any thread may read.
    """

    def __init__(self, shards: Sequence[Shard], files: ShardFiles | None = None) -> None:
        self.shards = tuple(shards)
        self.files = files or ShardFiles()
        self._ends = np.cumsum([len(shard.keys) for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [len(shard.keys) for shard in self.shards]

    @property
    def encoded(self) -> bool:
        """Whether the samples are payloads of an encoded set."""
        return self.shards[0].encoded

    def locate(self, sample: int) -> tuple[Shard, int]:
        """A sample's shard and its row there."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of an index of {len(self)}")
        number = int(np.searchsorted(self._ends, sample, side="right"))
        shard = self.shards[number]
        return shard, sample - int(self._ends[number]) + len(shard.keys)

    def key(self, sample: int) -> str:
        """The sample's key within its shard."""
        shard, row = self.locate(sample)
        return shard.keys[row]

    def where(self, sample: int) -> str:
        """The sample's place in words, for messages."""
        shard, row = self.locate(sample)
        return shard.where(row)

    def sizes(self) -> np.ndarray:
        """int64 (N, 2): upright width and height of every picture, 0 where unknown."""
        return np.concatenate([shard.table[:, [WIDTH, HEIGHT]] for shard in self.shards])

    def read_image(self, sample: int) -> bytes:
        """The image member's bytes.

        Raises:
            BadSampleError: They cannot be read, or are more than ``MAX_IMAGE_BYTES``.
        """
        shard, row = self.locate(sample)
        return self._read(shard, row, DATA_OFFSET, MAX_IMAGE_BYTES)

    def read_caption(self, sample: int) -> str:
        """The caption, without surrounding white space.

        Raises:
            BadSampleError: There is none, it cannot be read, is more than ``MAX_CAPTION_BYTES``, no
                UTF-8 text, or json without a caption.
        """
        shard, row = self.locate(sample)
        kind, where = int(shard.table[row, CAPTION_KIND]), shard.where(row)
        if kind == NO_CAPTION:
            raise BadSampleError("no caption", f"{where}: no caption: add KEY.txt or KEY.json.")
        data = self._read(shard, row, CAPTION_OFFSET, MAX_CAPTION_BYTES)
        return parse_caption(data, CAPTION_EXTENSIONS[kind], where)

    def _read(self, shard: Shard, row: int, column: int, limit: int) -> bytes:
        offset, size = (int(value) for value in shard.table[row, column : column + 2])
        if size > limit:
            raise BadSampleError(
                "too many bytes", f"{shard.where(row)}: a member of {size} bytes; limit {limit}."
            )
        try:
            return self.files.read(shard.path, offset, size)
        except BadSampleError as error:
            raise BadSampleError(error.kind, f"{shard.where(row)}: {error}") from error

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


def parse_caption(data: bytes, extension: str, where: str) -> str:
    """The caption in a ``txt`` or ``json`` member, without surrounding white space.

    Raises:
        BadSampleError: No UTF-8 text, or json without a string ``caption``.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(
            "caption not UTF-8", f"{where}: the caption is no UTF-8 text: {error}"
        ) from error
    if extension == "txt":
        return text.strip()
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("no caption", f"{where}: the caption is no json: {error}") from error
    caption = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(caption, str):
        raise BadSampleError(
            "no caption", f"{where}: the json has no string field 'caption'. Add it, or a .txt."
        )
    return caption.strip()


def build_index(
    shards: str | Sequence[str],
    *,
    setting: str = "data.shards",
    num_threads: int = 8,
    files: ShardFiles | None = None,
) -> ShardIndex:
    """Index the shards that ``shards`` names.

    Args:
        shards: Path, glob or brace pattern (``train-{000..015}.tar``, ``{a,b}/*.tar``), or a list
            of those. Order: the list's; the braces'; sorted within a glob.
        setting: The config key to name in errors.
        num_threads: How many shards are looked at at once.
        files: How to open them.

    Raises:
        DataError: No shard matches, a shard cannot be used, or there is no sample at all.
    """
    files = files or ShardFiles()
    paths = find_shards(shards, setting=setting)
    found: list[Shard] = []
    bad: list[str] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(index_shard, path, files) for path in paths]:
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
    index = ShardIndex(found, files)
    if len(index) == 0:
        raise DataError(
            f"{setting}={shards!r}: {len(paths)} shards match but hold no sample: an image "
            f"({', '.join(IMAGE_EXTENSIONS)}) and a caption ({', '.join(CAPTION_EXTENSIONS)}) of "
            "the same key. Point the setting at shards with samples."
        )
    if len({shard.encoded for shard in found}) > 1:
        raise DataError(f"{setting}={shards!r}: pictures and encoded shards. Name one kind.")
    return index


def index_shard(path: str, files: ShardFiles) -> Shard:
    """A shard by its index file, or by its member headers where it has none.

    Raises:
        DataError: See ``scan_shard``; or the index file is damaged or of another tar.
    """
    data = files.read_index(path)
    return scan_shard(path) if data is None else _from_index_file(path, data, files.size(path))


def _from_index_file(path: str, data: bytes, size: int) -> Shard:
    fix = "Make it again with tools/prepare_data.py, or delete it to have the tar scanned."
    name = f"{path}.index.json"
    try:
        record = json.loads(data)
        version, indexed = record["version"], record["size"]
        encoded = record.get("kind", "images") == "encoded"
        samples = record["samples"]
        keys = [str(sample["key"]) for sample in samples]
        rows = [
            (
                *sample["payload" if encoded else "image"],
                *(sample["caption"] or (0, 0)),
                _caption_kind(sample),
                sample["width"],
                sample["height"],
            )
            for sample in samples
        ]
        table = np.array(rows, dtype=np.int64).reshape(len(rows), 7)
        left_out = dict(record.get("ignored", {}))
        ignored = Counter({str(name): int(number) for name, number in left_out.items()})
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"{name}: damaged index ({error!r}). {fix}") from error
    if version != INDEX_VERSION:
        raise DataError(f"{name}: version {version!r}; this is version {INDEX_VERSION}. {fix}")
    if indexed != size:
        raise DataError(
            f"{name}: stale: it is of a tar of {indexed} bytes, but {path} has {size}. {fix}"
        )
    ends = table[:, [DATA_OFFSET, CAPTION_OFFSET]] + table[:, [DATA_SIZE, CAPTION_SIZE]]
    below = np.delete(table, CAPTION_KIND, axis=1) < 0
    if below.any() or (ends > size).any() or len(set(keys)) != len(keys):
        raise DataError(f"{name}: damaged index: members outside the tar or keys twice. {fix}")
    return Shard(path, size, keys, table, ignored, encoded)


def _caption_kind(sample: dict[str, Any]) -> int:
    if sample["caption"] is None:
        return NO_CAPTION
    return CAPTION_EXTENSIONS.index(sample.get("caption_extension", "txt"))


def scan_shard(path: str) -> Shard:
    """Read the member headers of one tar.

    Raises:
        DataError: See ``scan_tar``; or it has members but no sample.
    """
    return _group(path, scan_tar(path))


def _group(path: str, tar: ScannedTar) -> Shard:
    ignored = Counter(tar.ignored)
    keys: list[str] = []
    rows: list[tuple[int, ...]] = []
    for key, kinds in tar.members.items():
        image = next((kinds[e] for e in IMAGE_EXTENSIONS if e in kinds), None)
        caption = next((n for n, e in enumerate(CAPTION_EXTENSIONS) if e in kinds), NO_CAPTION)
        if image is None:
            ignored["captions without image"] += len(kinds)
            continue
        place = (0, 0) if caption == NO_CAPTION else kinds[CAPTION_EXTENSIONS[caption]]
        keys.append(key)
        rows.append((*image, *place, caption, 0, 0))
    table = np.array(rows, dtype=np.int64).reshape(len(rows), 7)
    if keys and (table[:, CAPTION_KIND] == NO_CAPTION).all():
        raise DataError(
            f"{path}: none of its {len(keys)} samples has a caption (first: {keys[0]!r}); an image "
            "needs a member of the same key ending in .txt or .json. Add the captions or take the "
            "shard out of the setting."
        )
    if not keys and (tar.members or ignored):
        counts = ", ".join(f"{number} {reason}" for reason, number in ignored.items())
        raise DataError(
            f"{path}: no sample in it ({counts}); an image must be named KEY.EXT with EXT one of "
            f"{', '.join(IMAGE_EXTENSIONS)} and no other dot in the file name."
        )
    return Shard(path, tar.size, keys, table, ignored)
