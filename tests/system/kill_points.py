"""The training command with a kill point: this process dies by SIGKILL in the middle of a step, or
at its k-th change of a file below a folder.

Changes are counted where they reach the operating system, in any thread: what is counted knows
nothing of the functions that save. Files opened for writing are Python's own implementation, whose
bytes go through ``os.write``, so that a kill can come after half of them.
"""

from __future__ import annotations

import _pyio
import builtins
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soar_mega import train
from soar_mega.pipeline.executor import Executor

# By the argument that says which file is changed.
_OF_PATH = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink")
_OF_DESCRIPTOR = ("write", "pwrite", "writev", "fsync", "fdatasync", "ftruncate")


@dataclass(frozen=True)
class Change:
    """One change of a file, as an unbroken run noted it."""

    call: str
    path: str


@dataclass(frozen=True)
class Watch:
    """What a process does besides training.

    Attributes:
        folder: Below it changes are counted.
        notes: File that gets a line for each change, or for the kill.
        change: Die at this change, from 1.
        step: Die in this step, from 1.
    """

    folder: Path
    notes: Path
    change: int | None = None
    step: int | None = None

    def changes(self) -> list[Change]:
        """What the process noted."""
        return [Change(*line.split(" ", 1)) for line in self.notes.read_text().splitlines()]


class _Counter:
    def __init__(self, watch: Watch) -> None:
        self._watch, self._below = watch, os.path.abspath(watch.folder) + os.sep
        self._notes = os.open(watch.notes, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        self._write, self._fsync = os.write, os.fsync
        self._lock, self._count = threading.Lock(), 0

    def install(self) -> None:
        for name in _OF_PATH:
            setattr(os, name, self._of_path(name, getattr(os, name)))
        for name in _OF_DESCRIPTOR:
            setattr(os, name, self._of_descriptor(name, getattr(os, name)))
        os.open = self._of_open(os.open)
        builtins.open = io.open = _python_open(io.open)  # type: ignore[assignment]

    def note(self, text: str) -> None:
        self._write(self._notes, f"{text}\n".encode())

    def die(self, where: str) -> None:
        self.note(f"died {where}")
        self._fsync(self._notes)
        os.kill(os.getpid(), signal.SIGKILL)

    def _change(self, name: str, path: str, before: Callable[[], Any] = lambda: None) -> None:
        if not (path + os.sep).startswith(self._below):
            return
        with self._lock:
            self._count += 1
            if self._count == self._watch.change:
                before()
                self.die(f"{name} {path}")
            self.note(f"{name} {path}")

    def _of_path(self, name: str, original: Any) -> Any:
        def changing(path: Any, *rest: Any, **more: Any) -> Any:
            self._change(name, _absolute(path, more.get("dir_fd")))
            return original(path, *rest, **more)

        return changing

    def _of_descriptor(self, name: str, original: Any) -> Any:
        def changing(descriptor: int, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{descriptor}")

            def half() -> None:
                if name == "write":
                    data = memoryview(rest[0]).cast("B")
                    original(descriptor, data[: len(data) // 2])

            self._change(name, path, half)
            return original(descriptor, *rest)

        return changing

    def _of_open(self, original: Any) -> Any:
        def opening(path: Any, flags: int, *rest: Any, **more: Any) -> Any:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._change("open", _absolute(path, more.get("dir_fd")))
            return original(path, flags, *rest, **more)

        return opening


def _absolute(path: Any, folder: int | None) -> str:
    start = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    return os.path.normpath(os.path.join(start, os.fsdecode(path)))


def _python_open(original: Any) -> Any:
    def opening(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return (original if set(mode) <= set("rbtU") else _pyio.open)(file, mode, *rest, **more)

    return opening


def _die_in_step(number: int, counter: _Counter) -> None:
    """At the first backward of the step: forwards are done, messages are under way."""
    run, backward, steps = Executor.run, Executor._backward, [0]

    def counting(self: Executor, *arguments: Any) -> None:
        steps[0] += 1
        run(self, *arguments)

    def dying(self: Executor, *arguments: Any) -> None:
        if steps[0] == number:
            counter.die(f"in step {number}")
        backward(self, *arguments)

    Executor.run = counting  # type: ignore[method-assign]
    Executor._backward = dying  # type: ignore[method-assign]


def train_watched(
    environment: dict[str, str], arguments: list[str], output: Path, watch: Watch
) -> None:
    """Ends the process with the command's exit code; for a process made for this.

    Args:
        environment: All of it.
        arguments: Of ``python -m soar_mega.train``.
        output: File for what it prints.
        watch: Where it dies.
    """
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    counter = _Counter(watch)
    counter.install()
    if watch.step is not None:
        _die_in_step(watch.step, counter)
    sys.exit(train.main(arguments))
