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
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.files import ShardFiles
from soar_mega.data.shards.index_file import read_index_file
from soar_mega.data.shards.patterns import find_shards
from soar_mega.data.shards.remote import index_name, is_remote, shard_name, shown
from soar_mega.data.shards.scan import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, ScannedTar, scan_tar
from soar_mega.data.shards.shard import (
    CAPTION_KIND,
    CAPTION_OFFSET,
    DATA_OFFSET,
    HEIGHT,
    NO_CAPTION,
    WIDTH,
    Shard,
)

MAX_IMAGE_BYTES = 2**28
MAX_CAPTION_BYTES = 2**20


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
            head = [shard_name(shard.path), shard.size, shard.keys]
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
        shards: Path, URL, glob or brace pattern (``train-{000..015}.tar``, ``{a,b}/*.tar``), or a
            list of those. Order: the list's; the braces'; sorted within a glob.
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
    """A shard by its index file, or by its member headers where it is local and has none.

    Raises:
        DataError: See ``scan_shard``; or the index file is damaged or of another tar, or that of a
            remote shard is missing.
    """
    data = files.read_index(path)
    if data is not None:
        shard = read_index_file(path, data, files.size(path))
        files.expect(path, shard.size)
        return shard
    if is_remote(path):
        raise DataError(
            f"{shown(path)}: no index beside it ({shown(index_name(path))}). To scan the tar would "
            "download all of it: make the index where the tars lie (tools/prepare_data.py writes "
            "SHARD.index.json, tools/inspect_data.py --write-index too) and upload it."
        )
    return scan_shard(path)


def check_cache(sources: Sequence[Sequence[Shard]], window: int | None, files: ShardFiles) -> None:
    """Refuse a cache that cannot hold any window of each source's remote shards, and the next,
    which is fetched ahead: shards would be fetched again and again.

    Args:
        sources: The shards of each.
        window: ``data.shuffle_shards``.
        files: What reads them.

    Raises:
        DataError: It names the settings, the bytes needed and the fix.
    """
    remote = [[shard.size for shard in shards if is_remote(shard.path)] for shards in sources]
    held = [sorted(sizes, reverse=True)[: 2 * window if window else None] for sizes in remote]
    needed = sum(map(sum, held))
    if needed > files.cache_bytes:
        raise DataError(
            f"data.cache_gb allows {files.cache_bytes} bytes, but data.shuffle_shards = "
            f"{window or 'null'} keeps up to {sum(map(len, held))} shards at once (in use and to "
            f"come next), of {needed} bytes. Set data.cache_gb to at least "
            f"{math.ceil(needed / 1e8) / 10}, lower data.shuffle_shards or make smaller shards."
        )


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
