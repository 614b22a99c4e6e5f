"""Run a function on several gloo processes of this machine and collect what each returns."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soar_mega import train as command_line
from tests.ports import free_port

# Far beyond what any case takes on two free cores; a busy machine takes several times as long.
_TIMEOUT_S = 300

# Seconds of imports that every run needs, of which many are made late: within functions.
_IMPORTED_BEFOREHAND = [
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.pipelines.stable_diffusion_3",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "soar_mega.training.trainer",
    "tests.runs",
]


@cache
def warm_context() -> BaseContext:
    """Starts processes in hundredths of a second, as forks of one that has imported everything.

    That server has no thread and no process group, and never runs a test, so what is forked from
    it is as fresh as a new interpreter.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_BEFOREHAND)
    with pytest.MonkeyPatch.context() as patch:
        # The server would look for modules in its working directory only.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on ``world_size`` new processes with a gloo default group.

    ``function`` must be importable (module level) and return something ``torch.save`` can write.
    The processes have this one's environment and working directory, and nothing else of it. A world
    of one is this process itself.

    Raises:
        AssertionError: A rank failed (its traceback is the message) or did not end in time.
    """
    if world_size == 1:
        return [function(*arguments)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            warm_context().Process(  # type: ignore[attr-defined]
                target=_enter,
                args=(rank, world_size, folder, dict(os.environ), function, arguments),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + _TIMEOUT_S
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        errors = sorted(Path(folder).glob("error_*"))
        if errors:
            raise AssertionError("\n".join(f"{e.name}:\n{e.read_text()}" for e in errors))
        assert not alive, f"ranks {alive} of {world_size} did not end within {_TIMEOUT_S} s"
        return [
            torch.load(Path(folder) / f"result_{rank}", weights_only=False)
            for rank in range(world_size)
        ]


def _enter(
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{folder}/store", world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_TIMEOUT_S),
        )
        torch.save(function(*arguments), Path(folder) / f"result_{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error_{rank}").write_text(traceback.format_exc())
        raise


@dataclass(frozen=True)
class Commands:
    """Processes of the training command on this machine, as torchrun starts them.

    Attributes:
        processes: One for each rank.
        folder: Rank r's output is in ``out<r>`` and ``err<r>``.
    """

    processes: list[BaseProcess]
    folder: Path

    def wait(self, seconds: float = _TIMEOUT_S) -> list[int | None]:
        """Exit codes when all have ended; None: still running."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def errors(self, rank: int) -> str:
        """What the rank wrote to stderr so far."""
        return (self.folder / f"err{rank}").read_text()

    def shown(self, rank: int = 0) -> str:
        """What the rank wrote to stdout so far."""
        return (self.folder / f"out{rank}").read_text()


@contextmanager
def running_commands(
    world_size: int,
    folder: Path,
    arguments: list[str],
    prepare: Callable[..., None],
    *more: Any,
) -> Iterator[Commands]:
    """``python -m soar_mega.train ARGUMENTS`` on new processes, killed at the end of the block.

    Args:
        world_size: Number of processes.
        folder: For their output; made if missing.
        arguments: Of the command.
        prepare: ``prepare(rank, *more)`` runs in each process before the command; importable.
        more: For ``prepare``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = []
    for rank in range(world_size):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(
            warm_context().Process(  # type: ignore[attr-defined]
                target=_enter_command, args=(folder, own, arguments, prepare, more)
            )
        )
    try:
        for process in processes:
            process.start()
        yield Commands(processes, folder)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _enter_command(
    folder: Path,
    environment: dict[str, str],
    arguments: list[str],
    prepare: Callable[..., None],
    more: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank = int(environment["RANK"])
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    prepare(rank, *more)
    sys.exit(command_line.main(arguments))
