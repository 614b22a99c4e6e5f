"""From a shard setting to the files it names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from soar_mega.data.errors import DataError
from soar_mega.data.shards.remote import file_system, is_command, is_http, is_remote, shown

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(shards: str | Sequence[str], *, setting: str = "data.shards") -> list[str]:
    """The files that a shard setting names, in order (see ``build_index``).

    Braces are expanded everywhere, globs where files can be listed: locally and by fsspec, not over
    http. Whether a remote shard without a glob is there shows when it is opened.

    Raises:
        DataError: A pattern matches nothing or cannot be listed, a path is no file, or a file is
            named twice.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    paths: list[str] = []
    for pattern in patterns:
        local = pattern.removeprefix("file://")
        if is_remote(local):
            for url in _expand(pattern):
                paths.extend(_remote_matches(url, pattern, setting))
            continue
        for path in _expand(os.path.expanduser(local)):
            paths.extend(_matches(path, pattern, setting))
    if not paths:
        raise DataError(f"{setting}={shards!r}: names no shard. Give a path, a glob or a list.")
    places = (path if is_remote(path) else os.path.abspath(path) for path in paths)
    path, times = Counter(places).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"{setting}={shards!r}: names {shown(path)} {times} times. Remove the overlap."
        )
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


def _remote_matches(url: str, pattern: str, setting: str) -> list[str]:
    if is_command(url):
        return [url]
    if is_http(url):
        try:
            path = urlsplit(url).path
        except ValueError as error:
            raise DataError(f"{setting}={pattern!r}: {error}. Correct the URL.") from error
        if "*" in path or "[" in path:
            raise DataError(
                f"{setting}={pattern!r}: http servers do not list their files, so a glob matches "
                "nothing. Use braces: train-{000..015}.tar."
            )
        return [url]
    if not glob.has_magic(url):
        return [url]
    system, path = file_system(url)
    try:
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    except Exception as error:  # every file system of fsspec has errors of its own
        raise DataError(f"{setting}={pattern!r}: cannot be listed: {error}") from error
    if not found:
        raise DataError(f"{setting}={pattern!r}: no shard matches {url!r}. Correct it.")
    return found


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
