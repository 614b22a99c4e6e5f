"""Reads byte ranges of shards, wherever they lie."""

from __future__ import annotations

import os

from soar_mega.data.errors import BadSampleError, DataError

INDEX_SUFFIX = ".index.json"


class ShardFiles:
    """Opens shards by path; any thread may read.

    Methods that read samples raise ``BadSampleError`` of kind ``unreadable``: a file that is gone
    or became shorter costs its samples, not the run.
    """

    def size(self, path: str) -> int:
        """Length in bytes.

        Raises:
            DataError: There is no such shard.
        """
        try:
            return os.stat(path).st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error

    def read_index(self, path: str) -> bytes | None:
        """The bytes of the shard's index file; None where there is none."""
        try:
            with open(path + INDEX_SUFFIX, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}{INDEX_SUFFIX}: cannot be read: {error.strerror}") from error

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Some bytes of a shard.

        Raises:
            BadSampleError: They are not there.
        """
        buffer = bytearray(size)
        self.read_into(path, offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset``.

        Raises:
            BadSampleError: They are not there.
        """
        try:
            with open(path, "rb", buffering=0) as file:
                done = 0
                while done < len(buffer):
                    count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
                    if count == 0:
                        break
                    done += count
        except OSError as error:
            raise BadSampleError("unreadable", f"{path}: cannot be read: {error}") from error
        if done < len(buffer):
            raise BadSampleError(
                "unreadable",
                f"{path}: {done} of {len(buffer)} bytes at {offset}; the shard changed after it "
                "was scanned. Do not write to shards that are in use.",
            )
