"""Reads a tar's member headers: the only place that looks inside a tar.

Members are never extracted: a scan keeps offsets and sizes.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from dataclasses import dataclass

from soar_mega.data.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json")  # in order of preference
MAX_MEMBERS = 1_000_000  # of one tar
MAX_HEADER_BYTES = 2**20
MAX_NAME_LENGTH = 1024
_BLOCK, _TAIL = 512, 2**16  # of the tail, this much is looked at; writers pad to 10 KiB


class _HeaderFile(io.FileIO):
    """A file that refuses large reads: a scan only ever needs headers, and an extended header may
    claim any length."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes (limit {MAX_HEADER_BYTES})")
        return super().read(size)


# Key -> extension -> (offset, size) in bytes of the member's data.
Members = dict[str, dict[str, tuple[int, int]]]


@dataclass(frozen=True)
class ScannedTar:
    """What the headers of a tar say.

    Attributes:
        size: Length of the file in bytes.
        members: Images and captions, by key.
        ignored: Counts of everything else, by reason; where the tar is cut short, what came before
            the cut is used and ``CUT`` is counted once.
    """

    size: int
    members: Members
    ignored: Counter[str]


CUT = "tar cut short"


def scan_tar(path: str) -> ScannedTar:
    """Read the member headers of one tar.

    Raises:
        DataError: The file cannot be read, is no uncompressed tar, is damaged before its end, has
            duplicate members or more than ``MAX_MEMBERS``.
    """
    members: Members = {}
    ignored: Counter[str] = Counter()
    try:
        with _HeaderFile(path) as file:
            size = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=file, mode="r:") as tar:
                end = _scan(path, tar, size, members, ignored)
            if end is not None:
                _check_end(path, file, end, size, ignored)
    except DataError:
        raise
    # Damaged extended headers make tarfile raise nearly anything, ValueError most of all.
    except Exception as error:
        raise DataError(
            f"{path}: not readable as an uncompressed tar ({error}): damaged, compressed or "
            "without permission. Write or copy it again, or take it out."
        ) from error
    return ScannedTar(size, members, ignored)


def _scan(
    path: str, tar: tarfile.TarFile, size: int, members: Members, ignored: Counter[str]
) -> int | None:
    """Where the archive should end; None: it was cut before."""
    number, last = 0, -1
    while True:
        try:
            info = tar.next()
        except tarfile.ReadError:
            # Python says "unexpected end of data" and "bad checksum" with one class: it is a cut
            # if there is nothing behind.
            if tar.offset + _BLOCK < size:
                raise
            ignored[CUT] += 1
            return None
        if info is None:
            return int(tar.offset)
        # Some versions of Python go round in circles on such.
        if info.size < 0 or info.offset <= last:
            raise tarfile.ReadError(f"a member of {info.size} bytes at byte {info.offset}")
        last = info.offset
        number += 1
        if number > MAX_MEMBERS:
            raise DataError(
                f"{path}: more than {MAX_MEMBERS} members, the limit of one tar. Split it: "
                "tools/prepare_data.py makes shards of any size."
            )
        tar.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
        tar.pax_headers = {}  # of global headers, too
        if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
            ignored[CUT] += 1
            return None
        _take(path, info, members, ignored)


def _take(path: str, info: tarfile.TarInfo, members: Members, ignored: Counter[str]) -> None:
    """Note one member, or count why not."""
    if info.isdir():
        return
    if not info.isreg() or info.issparse():
        ignored["links, devices and sparse files"] += 1
        return
    name = info.name.removeprefix("./")
    if not usable_name(name):
        ignored["odd names"] += 1
        return
    parts = name.split("/")
    stem, dot, extension = parts[-1].partition(".")
    extension = extension.lower()
    if not dot or extension not in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS:
        ignored["other extensions"] += 1
        return
    key = "/".join([*parts[:-1], stem])
    kinds = members.setdefault(key, {})
    clash = [k for k in kinds if k == extension or {k, extension} <= set(IMAGE_EXTENSIONS)]
    if clash:
        raise DataError(
            f"{path}: key {key!r} has both .{clash[0]} and .{extension} members; a key has one "
            "image and one caption of a kind. Give each sample a key of its own."
        )
    kinds[extension] = (info.offset_data, info.size)


def usable_name(name: str) -> bool:
    """Whether a key, or a member of it, may be called so: a relative path that stays in its
    folder, printable and of sane length, the last part not hidden."""
    parts = name.split("/")
    odd = "" in parts or ".." in parts or parts[-1].startswith(".")
    return not odd and name.isprintable() and len(name) <= MAX_NAME_LENGTH


def _check_end(path: str, file: _HeaderFile, end: int, size: int, ignored: Counter[str]) -> None:
    """tarfile stops silently at a damaged header, a missing end mark and the first of several."""
    file.seek(end)
    tail = file.read(min(max(size - end, 0), _TAIL))
    if len(tail) < _BLOCK:  # a writer that was not closed leaves this
        ignored[CUT] += 1
        return
    if any(tail[:_BLOCK]):
        raise DataError(f"{path}: damaged: byte {end} starts no member header. Write it again.")
    if any(tail):
        raise DataError(
            f"{path}: more data after the end-of-archive mark at byte {end} (tars joined with "
            "cat?). Write it again as one archive."
        )
