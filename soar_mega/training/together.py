"""What the ranks of a run agree on before it begins, and how they end."""

from __future__ import annotations

import hashlib

import torch.distributed as dist

from soar_mega.config import Config, ConfigError, dump_yaml
from soar_mega.parallel.errors import waiting_for


def end_together() -> None:
    """Wait for all ranks before an end that is not 0; each of them must be about to end so.

    torchrun kills the others when the first one is gone, and rank 0 has its tracker to close and
    the reason to tell.
    """
    if dist.is_initialized():
        with waiting_for("every other process, to end together"):
            dist.barrier()


def agree_on_problem(problem: str | None) -> None:
    """Refuse on every rank what any rank refuses: files need not look the same from all machines.

    Raises:
        ConfigError: The problem of the lowest rank that has one.
    """
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            alone = len(problems) > 1 and problems[0] is None
            raise ConfigError(f"on rank {rank}: {found}" if alone else found)


def agree_on_steps(config: Config, data: str, prompts: str = "") -> None:
    """Every rank will do the same steps on the same samples: else they would wait for each other
    in the middle of the run, or train on other samples than they should.

    Args:
        config: The run.
        data: Fingerprint of its samples.
        prompts: Fingerprint of what its evaluations draw.

    Raises:
        ConfigError: On every rank, naming those that differ from rank 0.
    """
    if not dist.is_initialized():
        return
    known = {
        "the samples of data.shards or data.sources": data,
        "the prompts of validation.evaluate_prompts": prompts,
        "the configuration": hashlib.sha256(dump_yaml(config).encode()).hexdigest(),
    }
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, known)
    for what, value in everyone[0].items():
        others = [str(rank) for rank, one in enumerate(everyone) if one[what] != value]
        if others:
            raise ConfigError(
                f"{what} on rank {', '.join(others[:8])} differs from that on rank 0, so they "
                "would not do the same steps. Give all processes the same files and arguments"
            )
