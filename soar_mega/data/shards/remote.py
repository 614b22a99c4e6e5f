"""Opens what is no local file.

http(s) goes through the standard library: it needs no package, honours proxies and redirects, and
tells a lasting failure from a passing one. ``pipe:`` commands run through webdataset's ``gopen``,
every other URL is fsspec's.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import unquote_to_bytes, urlsplit, urlunsplit

from soar_mega.data.errors import DataError

BLOCK_BYTES = 2**18  # read at a time; stopping waits for one
INDEX_SUFFIX = ".index.json"
_PIPE = "pipe:"
_FSSPEC_BLOCK_BYTES = 2**23  # of one range request
_TIMEOUT_S = 30.0  # without a byte
_PASSING = (408, 425, 429)  # of the 4xx, those that may be better next time
_TAR = re.compile(r"[^\s/]*\.tar\b(?!.*\.tar\b)")


def is_remote(path: str) -> bool:
    """Whether it is a URL or a command, not a local path."""
    return is_command(path) or "://" in path


def is_command(path: str) -> bool:
    """Whether it is a ``pipe:`` command."""
    return path.startswith(_PIPE)


def is_http(path: str) -> bool:
    """Whether it is an http or https URL."""
    return path.lower().startswith(("http://", "https://"))


def index_name(path: str) -> str:
    """Where a shard's index lies: beside it. In an http URL the suffix goes before the query, in a
    command behind the last word's ``.tar``.

    Raises:
        DataError: A command without ``.tar``.
    """
    if is_http(path):
        parts = urlsplit(path)
        return urlunsplit(parts._replace(path=parts.path + INDEX_SUFFIX))
    if not is_command(path):
        return path + INDEX_SUFFIX
    name = _TAR.search(path)
    if name is None:
        raise DataError(
            f"{path}: a pipe: command must name a file ending in .tar: its index is read by the "
            f"same command with {INDEX_SUFFIX} behind it. Name the tar in the command."
        )
    return path[: name.end()] + INDEX_SUFFIX + path[name.end() :]


def shard_name(path: str) -> str:
    """The file name of a shard, without folder, query or the rest of a command."""
    if is_http(path):
        return os.path.basename(urlsplit(path).path)
    name = _TAR.search(path) if is_command(path) else None
    return name[0] if name else os.path.basename(path)


def shown(path: str) -> str:
    """The path for messages: an http URL without password and query, where signatures stand."""
    if not is_http(path):
        return path
    parts = urlsplit(path)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


@contextmanager
def open_remote(url: str) -> Iterator[IO[bytes]]:
    """A stream of the bytes behind a URL.

    A connection that is cut may look like the end of the data: compare lengths.

    Raises:
        DataError: fsspec does not know the scheme, or lacks its package.
        FileNotFoundError, PermissionError: Trying again does not help.
        OSError: It may.
    """
    try:
        if is_command(url):
            from webdataset.gopen import gopen

            with gopen(url, "rb") as stream:
                yield stream
        elif is_http(url):
            with _request(url, {}) as response:
                yield response
        else:
            system, path = file_system(url)
            with system.open(path, "rb", block_size=_FSSPEC_BLOCK_BYTES) as stream:
                yield stream
    except (OSError, DataError):
        raise
    except Exception as error:  # every file system of fsspec has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_start(url: str, limit: int) -> bytes:
    """What is behind a URL, up to some bytes more than ``limit``.

    Raises:
        DataError, OSError: See ``open_remote``; a connection that is cut is an OSError.
    """
    data = bytearray()
    with open_remote(url) as stream:
        while len(data) <= limit and (block := stream.read(BLOCK_BYTES)):
            data += block
        if len(data) <= limit and isinstance(stream, http.client.HTTPResponse) and stream.length:
            raise OSError(f"connection cut, {stream.length} bytes missing")
    return bytes(data)


def remote_size(url: str) -> int | None:
    """Length in bytes of what is behind a URL; None where only reading all of it would tell.

    Raises:
        DataError, OSError: See ``open_remote``.
    """
    if is_command(url):
        return None
    try:
        if not is_http(url):
            system, path = file_system(url)
            size = system.info(path)["size"]
            return None if size is None else int(size)
        # Not HEAD: a presigned URL is good for GET alone.
        with _request(url, {"Range": "bytes=0-0"}) as response:
            if response.status == http.client.PARTIAL_CONTENT:
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
            else:
                total = response.headers.get("Content-Length", "")
            return int(total) if total.isdigit() else None
    except (OSError, DataError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there.

    Raises:
        DataError: It does not know the scheme, or lacks its package.
    """
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: cannot be opened: {error}. Install the fsspec package of its scheme (s3fs for "
            "s3://, gcsfs for gs://) or correct the URL."
        ) from error
    return system, path


def _request(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    url = urlunsplit(parts._replace(netloc=host, fragment=""))
    request = urllib.request.Request(url, headers={"User-Agent": "soar-mega", **headers})
    if at:  # urllib takes it for a part of the host's name; another host must not see it
        token = base64.b64encode(unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        words = f"HTTP {error.code} {error.reason}"
        if error.code in (404, 410):
            raise FileNotFoundError(words) from None
        if 400 <= error.code < 500 and error.code not in _PASSING:
            raise PermissionError(words) from None
        raise OSError(words) from None
