"""Reads byte ranges of shards, wherever they lie."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Lock
from typing import TypeVar

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.cache import ShardCache
from soar_mega.data.shards.remote import (
    index_name,
    is_command,
    is_remote,
    read_start,
    remote_size,
    shown,
)

MAX_INDEX_BYTES = 2**25  # some 100,000 samples; hostile json takes 24 times as much when parsed
_FETCHES_AHEAD = 4  # at once
_FAILED_S = 60.0  # a shard that could not be fetched is not tried again for so long
_T = TypeVar("_T")


class ShardFiles:
    """Opens shards by path, URL or command; any thread may read.

    A remote shard is fetched whole into the cache when it is first read. Local ones are read where
    they are, each time by a new descriptor: keeping them open saved 9 microseconds a read, which
    no decoder notices.

    Methods that read samples raise ``BadSampleError`` of kind ``unreadable``: a file that is gone
    or became shorter costs its samples, not the run.

    Args:
        cache_dir: Folder for copies of remote shards, shared by the processes of a node; None
            refuses remote shards.
        cache_bytes: What it may hold.
        allow_pipe: Run ``pipe:`` commands.
        retries: How often a failed request is made again, with doubling pauses.
        retry_pause_s: Seconds before the first retry.
    """

    def __init__(
        self,
        cache_dir: str | None = None,
        cache_bytes: int = 0,
        *,
        allow_pipe: bool = False,
        retries: int = 4,
        retry_pause_s: float = 1.0,
    ) -> None:
        self.cache_bytes = cache_bytes
        folder = None if cache_dir is None else os.path.expanduser(cache_dir)
        self._cache = None if folder is None else ShardCache(folder, cache_bytes)
        self._allow_pipe = allow_pipe
        self._retries, self._pause_s = retries, retry_pause_s
        self._sizes: dict[str, int] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._stopped = Event()
        self._lock = Lock()
        self._ahead: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None

    def size(self, path: str) -> int | None:
        """Length in bytes; None where it is not known before all is read (commands, some servers).

        Raises:
            DataError: There is no such shard.
        """
        try:
            if not is_remote(path):
                return os.stat(path).st_size
            self._remote(path)
            return self._retry(lambda: remote_size(path))
        except OSError as error:
            raise DataError(f"{shown(path)}: cannot be read: {_words(error)}") from error

    def expect(self, path: str, size: int) -> None:
        """What the index says about a shard's length: a copy of another one is none."""
        self._sizes[path] = size

    def read_index(self, path: str) -> bytes | None:
        """The bytes of the shard's index file; None where there is none.

        Raises:
            DataError: It cannot be read, or is longer than ``MAX_INDEX_BYTES``.
        """
        name = index_name(path)
        data = self.read_small(name)
        if data is not None and len(data) > MAX_INDEX_BYTES:
            raise DataError(
                f"{shown(name)}: an index of more than {MAX_INDEX_BYTES} bytes, the limit. Make "
                "shards of fewer samples (tools/prepare_data.py --samples-per-shard)."
            )
        return data

    def read_small(self, path: str) -> bytes | None:
        """A small file that lies beside shards, past the cache; None where there is none.

        Returns:
            All of it, or its first bytes, more than ``MAX_INDEX_BYTES``.

        Raises:
            DataError: It cannot be read.
        """
        try:
            if is_remote(path):
                self._remote(path)
                return self._retry(lambda: read_start(path, MAX_INDEX_BYTES))
            with open(path, "rb") as file:
                # Not the cap itself: read() takes that much memory at once.
                length = os.fstat(file.fileno()).st_size
                return file.read(min(length, MAX_INDEX_BYTES) + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{shown(path)}: cannot be read: {_words(error)}") from error

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Some bytes of a shard.

        Raises:
            BadSampleError: They are not there.
            DataError: See ``read_into``.
        """
        buffer = bytearray(size)
        self.read_into(path, offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset``.

        Raises:
            BadSampleError: They are not there.
            DataError: The cache cannot be used (full, too small), or remote shards are refused.
        """
        try:
            file = self._open(path)
            try:
                done = 0
                while done < len(buffer):
                    count = os.preadv(file, [buffer[done:]], offset + done)
                    if count == 0:
                        break
                    done += count
            finally:
                os.close(file)
        except OSError as error:
            raise BadSampleError("unreadable", f"{shown(path)}: cannot be read: {error}") from error
        if done < len(buffer):
            raise BadSampleError(
                "unreadable",
                f"{shown(path)}: {done} of {len(buffer)} bytes at {offset}; the shard changed "
                "after it was scanned. Do not write to shards that are in use.",
            )

    def prefetch(self, paths: Iterable[str]) -> None:
        """Start fetching remote shards in the background, first come first served; local ones are
        passed over. A failure shows when the shard is read."""
        for path in paths:
            with self._lock:
                if not is_remote(path) or path in self._ahead or self._stopped.is_set():
                    continue
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_FETCHES_AHEAD, "fetch")
                self._ahead.add(path)
                self._pool.submit(self._fetch_ahead, path)

    def close(self) -> None:
        """Stop fetching, also what runs; shards that are not in the cache can no longer be read."""
        with self._lock:
            self._stopped.set()
            pool = self._pool
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch_ahead(self, path: str) -> None:
        try:
            with suppress(DataError):
                os.close(self._open(path))
        finally:
            with self._lock:
                self._ahead.discard(path)

    def _open(self, path: str) -> int:
        """A descriptor to read from."""
        if not is_remote(path):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        cache = self._remote(path)
        size = self._sizes.get(path) or self.size(path)
        if size is None:
            raise DataError(f"{shown(path)}: its length is unknown: read its index first.")
        try:
            return self._retry(lambda: self._fetch(cache, path, size))
        except OSError as error:
            words = (
                f"{shown(path)}: cannot be fetched: {_words(error)} ({self._retries} retries; not "
                f"tried again for {_FAILED_S:.0f} s)."
            )
            self._failed[path] = (time.monotonic(), words)
            raise BadSampleError("unreadable", words) from error

    def _fetch(self, cache: ShardCache, path: str, size: int) -> int:
        # Looked at before each try: other threads may have waited for the same shard.
        when, words = self._failed.get(path, (0.0, ""))
        if words and time.monotonic() - when < _FAILED_S:
            raise BadSampleError("unreadable", words)
        return cache.open(path, size, self._stopped)

    def _remote(self, path: str) -> ShardCache:
        """The cache, if remote shards, and this one, may be read at all."""
        if is_command(path) and not self._allow_pipe:
            raise DataError(
                f"{path}: a command, which data.allow_pipe = false forbids to run. Set it to true "
                "if you trust whoever wrote this setting, or name a file or URL."
            )
        if self._cache is None:
            raise DataError(
                f"{shown(path)}: is not on this machine, and data.cache_dir is not set. Set it to "
                "a folder on a local disk, and data.cache_gb to what it may take up there."
            )
        return self._cache

    def _retry(self, action: Callable[[], _T]) -> _T:
        for number in range(self._retries):
            try:
                return action()
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                if self._stopped.wait(self._pause_s * 2**number):
                    raise
        return action()


def _words(error: OSError) -> str:
    return error.strerror or str(error)
