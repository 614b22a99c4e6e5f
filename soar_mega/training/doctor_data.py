"""What a start would refuse about model and data, and whether samples can be read here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from soar_mega.checkpoint import store
from soar_mega.config import Config, ConfigError
from soar_mega.data.errors import BadSampleError
from soar_mega.data.sources import TrainingData
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.findings import Finding, ranks_at
from soar_mega.training.run_doctor import room_for_checkpoints, size_of
from soar_mega.training.saving import CHECKPOINTS
from soar_mega.training.setup import check_inputs
from soar_mega.training.submission import checkpoint_bytes


def examine_data(config: Config, process: ProcessEnvironment) -> dict[str, Any]:
    """One rank's look, ready for JSON.

    Returns:
        ``refused``, the message of what a start would refuse, else None. Where nothing is:
        ``fingerprint`` of the samples, ``shards``, ``samples``, ``checkpoint`` (bytes), and on the
        first process of a machine ``unread``, why the first sample cannot be read, else None.
    """
    try:
        checked = check_inputs(config, process.world_size)
    except (ConfigError, ValueError, OSError) as error:
        return {"refused": str(error)}
    data = checked.data
    try:
        return {
            "refused": None,
            "fingerprint": data.fingerprint(),
            "shards": len(data.index.shards),
            "samples": len(data.index),
            "checkpoint": checkpoint_bytes(checked.architecture),
            "unread": _unread(data) if process.local_rank == 0 else None,
        }
    finally:
        data.index.files.close()
        if data.encoded is not None:
            data.encoded.close()


def _unread(data: TrainingData) -> str | None:
    """Why the bytes of the first sample cannot be read; None: they can."""
    if data.encoded is not None:
        rows_BN = data.encoded.new_rows(data.encoded.buckets[data.encoded.buckets_N[0]], 1)
        (problem,) = data.encoded.read([0], rows_BN)
        return None if problem is None else str(problem)
    try:
        data.index.read_image(0)
        data.index.read_caption(0)
    except BadSampleError as error:
        return str(error)
    return None


def data_findings(
    answers: Mapping[int, Mapping[str, Any]], hosts: Sequence[str]
) -> Iterator[Finding]:
    """Whether all ranks have the same samples and every machine can read them.

    Args:
        answers: Of ``examine_data``, where nothing was refused; rank 0's first, if it is there.
        hosts: Of every rank.
    """
    first = next(iter(answers.values()))
    others = [rank for rank, a in answers.items() if a["fingerprint"] != first["fingerprint"]]
    if others:
        yield Finding(
            "PROBLEM",
            f"data: the samples on {ranks_at(others, hosts)} are not those of rank "
            f"{next(iter(answers))}: other shards, lengths or keys",
            "give all nodes the same files: data.shards and data.sources on shared storage, or "
            "copies that are alike",
            cause="input",
        )
    unread: dict[str, list[int]] = {}
    for rank, answer in answers.items():
        if answer["unread"] is not None:
            unread.setdefault(answer["unread"], []).append(rank)
    nodes = {hosts[rank] for rank in answers}
    for words, ranks in unread.items():
        everywhere = {hosts[rank] for rank in ranks} == nodes
        yield Finding(
            "PROBLEM",
            f"data: the first sample cannot be read on {ranks_at(ranks, hosts)}: {words}",
            "mend or replace that shard (tools/inspect_data.py)"
            if everywhere
            else "see whether its file system is mounted there, or leave that node out "
            "(sbatch --exclude)",
            cause="input" if everywhere else "machine",
        )
    if not others and not unread:
        where = f", the same on all {len(answers)} ranks" if len(answers) > 1 else ""
        yield Finding(
            "ok",
            f"data and model: {first['samples']:,} samples, shards: {first['shards']:,}{where}; "
            "nothing a start would refuse",
        )


def room_findings(config: Config, answers: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    """Room for the checkpoints, by the newest one where there is one, else by the model's size.

    Raises:
        OSError: ``run.dir`` is not there.
    """
    folder = Path(config.run.dir)
    there = store.committed(folder / CHECKPOINTS)
    size = size_of(there[-1]) if there else next(iter(answers.values()))["checkpoint"]
    limit = config.checkpoint.checkpoints_total_limit
    yield room_for_checkpoints(folder, size, len(there), limit)
