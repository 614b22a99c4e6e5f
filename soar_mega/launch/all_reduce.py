"""Sums numbers over all ranks as training does: are they right, and how fast is it?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from soar_mega.launch.findings import Finding, ranks_at

if TYPE_CHECKING:
    from torch.distributed import Store

# Bytes.
_SIZES = {"nccl": (2**16, 2**24, 2**28), "gloo": (2**14, 2**20, 2**23)}
_REPEATS = 5


def all_reduce(
    store: Store, rank: int, world_size: int, gpu: int | None, seconds: float
) -> dict[str, Any]:
    """Sum several sizes over all ranks; every rank calls it.

    Args:
        store: One of all ranks, for this alone.
        rank, world_size: Place of this process.
        gpu: The own one, over NCCL; None: the CPU, over gloo.
        seconds: After which torch itself gives up.

    Returns:
        ``wrong``, whether a sum was; and ``seconds``, the median time by size in bytes.
    """
    import torch
    import torch.distributed as dist

    backend = "gloo" if gpu is None else "nccl"
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    if gpu is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
        device_id=None if gpu is None else device,
    )
    wrong, medians = False, {}
    for size in _SIZES[backend]:
        # Whole numbers: exact in any order of summation.
        pattern = torch.arange(size // 4, dtype=torch.int32, device=device) % 13 + 1
        expected, times = pattern * (world_size * (world_size + 1) // 2), []
        for _ in range(_REPEATS):
            tensor = pattern * (rank + 1)
            dist.barrier()
            if gpu is not None:
                torch.cuda.synchronize()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if gpu is not None:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            wrong |= not torch.equal(tensor, expected)
        medians[str(size)] = median(times)
    dist.destroy_process_group()
    return {"wrong": wrong, "seconds": medians}


def bandwidth(size: int, seconds: float, world_size: int) -> float:
    """GB/s that each rank sends, by the least that any all-reduce of ``size`` bytes must send."""
    return 2 * (world_size - 1) / world_size * size / seconds / 1e9


def all_reduce_findings(
    answers: Mapping[int, Mapping[str, Any]], hosts: Sequence[str], over: str
) -> Finding:
    """The answers of all ranks in one line.

    Args:
        answers: By rank; of all of them.
        hosts: Of every rank.
        over: ``NCCL`` or ``gloo``.
    """
    wrong = [rank for rank, answer in answers.items() if answer["wrong"]]
    if wrong:
        return Finding(
            "PROBLEM",
            f"all-reduce: over {over} the sum is wrong on {ranks_at(wrong, hosts)}",
            "a GPU, a link or a driver there is broken: leave the node out (sbatch --exclude), and "
            "look for errors in the kernel's log and in dcgmi diag",
        )
    times, rate = [], 0.0
    for size in map(int, answers[0]["seconds"]):
        slowest = max(answer["seconds"][str(size)] for answer in answers.values())
        rate = bandwidth(size, slowest, len(answers))
        shown = f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"
        times.append(f"{shown} in {slowest * 1e3:.3g} ms")
    return Finding(
        "note",
        f"all-reduce: right over {over} on all {len(answers)} ranks; {', '.join(times)} "
        f"({rate:.2g} GB/s per rank)",
    )
