"""The device of a process, and joining the others."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from soar_mega.config import ConfigError
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.machine_facts import own_gpu
from soar_mega.launch.rendezvous import open_store


def device_of(wanted: str, process: ProcessEnvironment) -> torch.device:
    """The device ``run.device`` means for this process.

    Args:
        wanted: ``auto`` (CUDA if there is), ``cpu`` or ``cuda``.
        process: Its place.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("run.device = cuda, but torch finds no CUDA device: use auto or cpu")
    count = torch.cuda.device_count()
    number = own_gpu(process.local_rank, count)
    if number is None:
        raise ConfigError(
            f"process {process.local_rank} of this machine has no GPU: there are {count}; start at "
            f"most {count} processes a machine"
        )
    return torch.device("cuda", number)


def start_processes(process: ProcessEnvironment, device: torch.device, timeout: timedelta) -> None:
    """Join the default process group where there is more than one process.

    Raises:
        RendezvousError: Rank 0 cannot listen, or is not found.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if process.world_size == 1:
        return
    # torch knows how to share the agent's among restarts.
    store = None if process.agent_store else open_store(process, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=process.rank,
        world_size=process.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def leave_processes() -> None:
    """Leave the default process group, before an end that every rank comes to.

    Where it is left up, gloo's threads abort the interpreter's exit now and then, and a launcher
    sees signal 6 in place of the exit code: 2 of 4 refused evaluations (torch 2.13, 2 processes).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
