"""Run a function on several gloo processes of this machine and collect what each returns."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

# Far beyond what any case takes on two free cores; a busy machine takes several times as long.
_TIMEOUT_S = 300


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on ``world_size`` processes with a gloo default group.

    ``function`` must be importable (module level) and return something ``torch.save`` can write.

    Raises:
        AssertionError: A rank failed (its traceback is the message) or did not end in time.
    """
    if world_size == 1:
        return [function(*arguments)]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_enter, args=(rank, world_size, folder, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_TIMEOUT_S)
        alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
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
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
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
