"""A folder that holds copies of remote shards, shared by all processes of a node.

``soar-HASH-NAME`` is a whole shard; ``soar-HASH-NAME.partial`` one that is being fetched, as long
as it will be, so that file lengths are what the cache takes up. Two locks, both of the kernel
(flock), so that a killed process leaves none: on a partial file, by whoever fetches it; on
``soar.lock``, while room is made and while a partial file becomes a whole one. Files of other names
are left alone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.remote import BLOCK_BYTES, open_remote, shard_name, shown

_LOCK = "soar.lock"
_PARTIAL = ".partial"
_OURS = re.compile(r"soar-[0-9a-f]{32}-[A-Za-z0-9._-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_NAME_LENGTH = 80
_WAIT_S = 0.05  # between looks for room that other processes' fetches take up
_FRESH_NS = 10**9  # a file used within this long is not touched again


class ShardCache:
    """Fetches shards whole and lends them; the least recently used ones make room.

    A shard that was thrown out stays readable where it is open. Any thread of any process of the
    node may use the folder.

    Args:
        folder: Made if it is missing.
        limit: Bytes that it may hold, partial files included.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, url: str) -> str:
        """Where the copy of a shard lies, if there is one."""
        digest = hashlib.sha256(url.encode()).hexdigest()[:32]
        name = _UNSAFE.sub("_", shard_name(url))[-_NAME_LENGTH:]
        return os.path.join(self.folder, f"soar-{digest}-{name}")

    def open(self, url: str, size: int, stopped: Event) -> int:
        """A descriptor of the whole shard, open for reading; it is fetched if it is not here. The
        caller closes it.

        Args:
            url: The shard.
            size: Its length in bytes; a copy of another length is fetched again.
            stopped: Ends a fetch.

        Raises:
            OSError: The fetch failed; see ``open_remote``.
            BadSampleError: The fetch was stopped.
            DataError: The folder cannot be used, is full, or is too small for this shard.
        """
        final = self.path(url)
        with self._writing(url, size):
            found = _open_whole(final, size)
            if found is not None:
                return found
            if size > self.limit:
                raise DataError(
                    f"{shown(url)}: {size} bytes are more than the cache may hold (data.cache_gb: "
                    f"{self.limit} bytes). Raise data.cache_gb or make smaller shards."
                )
            os.makedirs(self.folder, exist_ok=True)
            partial = _lock(final + _PARTIAL, stopped)
        if partial is None:
            raise _stopped(url)
        keep = False
        try:
            found = _open_whole(final, size)  # another process was here first
            if found is None:
                self._fetch(url, partial, size, stopped)
                with self._writing(url, size), self._alone():
                    os.replace(final + _PARTIAL, final)
                keep = True
                fcntl.flock(partial, fcntl.LOCK_UN)
                return partial
            return found
        finally:
            if not keep:
                with suppress(FileNotFoundError):
                    os.unlink(final + _PARTIAL)  # it is locked: nobody else writes it
                os.close(partial)

    def _fetch(self, url: str, partial: int, size: int, stopped: Event) -> None:
        with self._writing(url, size):
            os.ftruncate(partial, 0)  # what a killed process left
        while not self._reserve(url, partial, size):
            if stopped.wait(_WAIT_S):
                raise _stopped(url)
        done = 0
        with open_remote(url) as stream:
            while done <= size and (block := stream.read(BLOCK_BYTES)):
                if stopped.is_set():
                    raise _stopped(url)
                with self._writing(url, size):
                    _write(partial, block[: size - done], done)
                done += len(block)
        if done != size:
            more = "at least " if done > size else ""
            raise OSError(f"{more}{done} bytes came instead of {size}")
        with self._writing(url, size):
            os.fsync(partial)

    def _reserve(self, url: str, partial: int, size: int) -> bool:
        """Take up room for a shard; False while others' fetches take up too much."""
        with self._writing(url, size), self._alone():
            whole: list[tuple[int, int, str]] = []
            used = size
            for entry in os.scandir(self.folder):
                if not _OURS.fullmatch(entry.name):
                    continue
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # a fetch that failed
                    continue
                if not entry.name.endswith(_PARTIAL):
                    whole.append((stat.st_mtime_ns, stat.st_size, entry.path))
                elif not _remove_orphan(entry.path):
                    used += stat.st_size
            if used > self.limit:
                return False
            used += sum(length for _, length, _ in whole)
            for _, length, path in sorted(whole):
                if used <= self.limit:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                used -= length
            os.ftruncate(partial, size)
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = os.open(os.path.join(self.folder, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _writing(self, url: str, size: int) -> Iterator[None]:
        """What fails here is the folder's fault, not the shard's."""
        try:
            yield
        except OSError as error:
            lead = f"data.cache_dir={self.folder!r}: cannot hold {shown(url)} ({size} bytes): "
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"{lead}{error}. Name a folder on a local disk that this user may write to."
                ) from error
            free = shutil.disk_usage(self.folder).free
            raise DataError(
                f"{lead}{error.strerror}: {free} bytes are free, and data.cache_gb lets the cache "
                f"grow to {self.limit}. Free some, lower data.cache_gb or use a larger disk."
            ) from error


def _stopped(url: str) -> BadSampleError:
    return BadSampleError("unreadable", f"{shown(url)}: not fetched: reading was stopped.")


def _open_whole(path: str, size: int) -> int | None:
    """The file if it is there and of that length; it counts as used now."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    stat = os.fstat(file)
    if stat.st_size != size:
        os.close(file)
        return None
    if time.time_ns() - stat.st_mtime_ns > _FRESH_NS:
        os.utime(file)
    return file


def _lock(path: str, stopped: Event) -> int | None:
    """Open or make the file and wait for its lock; closing it gives the lock back. None where
    waiting was stopped."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            if stopped.wait(_WAIT_S):
                os.close(file)
                return None
        os.close(file)  # somebody has it, or it was renamed or removed before we had it


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_orphan(path: str) -> bool:
    """Remove a partial file that nobody is writing: its process was killed."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):
            Path(path).unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
