"""From a shard setting to the files it names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from soar_mega.data.errors import DataError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


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
