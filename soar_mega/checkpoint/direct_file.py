"""Large new files, written past the page cache.

For converters, which read and write once and are then gone. Measured in turns (ext4 on a virtual
disk, 2 cores, medians of 3): 4.2 GB from diffusers 8.4 s so and 11.1 s through the page cache, to
diffusers 10.1 s and 14.4 s, 2.7 s of each being an import of torch that is not made any more.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

SMALLEST = 2**28  # bytes of a file below which the page cache is as good
_BLOCK = 16 * 2**20  # bytes of a call that writes; a multiple of any disk's sector
_BLOCKS = 4
_SECTOR = 4096


def create(path: Path, size: int) -> BinaryIO:
    """A new unbuffered file; past the page cache if it gets large and the file system lets it.

    ``flush`` comes before a sync of its descriptor.

    Args:
        path: The file; overwritten if it exists.
        size: Bytes that it will get.
    """
    direct = getattr(os, "O_DIRECT", 0)
    if size >= SMALLEST and direct:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct
            return cast(BinaryIO, DirectFile(os.open(path, flags, 0o666)))
        except OSError as error:
            if error.errno != errno.EINVAL:  # what file systems without it say, as tmpfs
                raise
    return path.open("wb", buffering=0)


class DirectFile:
    """What of a binary file a writer from front to back needs; made by ``create``.

    Such writes need aligned memory, so bytes are copied into one of a few blocks, while a thread
    writes the others.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # Maps begin at a page's border.
        maps = (mmap.mmap(-1, _BLOCK) for _ in range(_BLOCKS))
        self._blocks = [np.frombuffer(one, np.uint8) for one in maps]
        self._filled = 0  # bytes of the first block, which is never one that is being written
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()  # of the last blocks, oldest first

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        left = np.frombuffer(data, np.uint8)  # numpy lets other threads run while it copies
        total = len(left)
        while len(left):
            count = min(len(left), _BLOCK - self._filled)
            self._blocks[0][self._filled : self._filled + count] = left[:count]
            self._filled += count
            left = left[count:]
            if self._filled == _BLOCK:
                # Queued before any wait, so that the disk always has its next block.
                self._pending.append(self._thread.submit(self._write, self._blocks[0], _BLOCK))
                self._blocks.append(self._blocks.pop(0))
                self._filled = 0
                self._wait(_BLOCKS - 1)
        return total

    def _wait(self, allowed: int) -> None:
        while len(self._pending) > allowed:
            self._pending.popleft().result()

    def _write(self, block: NDArray[np.uint8], count: int, start: int = 0) -> None:
        while start < count:
            start += os.write(self._descriptor, block[start:count].data)

    def flush(self) -> None:
        """Write what is left; nothing can be written after it."""
        self._wait(0)
        whole = self._filled // _SECTOR * _SECTOR
        self._write(self._blocks[0], whole)
        if self._filled > whole:  # a part of a sector goes through the page cache
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._write(self._blocks[0], self._filled, whole)
        self._filled = 0

    def close(self) -> None:
        if self._descriptor < 0:
            return
        self._thread.shutdown()  # it has finished with descriptor and blocks then
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
