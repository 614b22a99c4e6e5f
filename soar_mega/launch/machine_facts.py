"""Versions, names and GPUs as one process sees them, and what is wrong with those of all."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soar_mega
from soar_mega.install.requirements import version_range, within
from soar_mega.launch.addresses import only_loopback, resolve
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.findings import Finding, ranks_at
from soar_mega.launch.optional import OPTIONAL, find, is_there
from soar_mega.launch.provenance import git_state, package_versions

_NEEDED = ("torch", "diffusers", "transformers", "webdataset")
_SHOWN = ("Python", "torch", "CUDA", "NCCL", "diffusers", "transformers", "webdataset")
# What others may hold of a GPU that is called free.
_BUSY_SHARE = 0.1
_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One that this process sees.

    Attributes:
        name, uuid: As the driver tells them.
        capability: Compute capability, as ``9.0``.
        total: Bytes of memory.
        free: Bytes that nobody holds; None where it was not asked, which takes memory itself.
    """

    name: str
    uuid: str
    capability: str
    total: int
    free: int | None


@dataclass(frozen=True)
class Facts:
    """Of one process, ready for JSON but for ``gpus``.

    Attributes:
        local_rank: Its number on its host.
        versions: Of packages, Python, CUDA, NCCL; None: not there.
        optional: Import names of optional packages that are there. NVIDIA's apex counts.
        other_apex: There is an apex that is not NVIDIA's.
        gpus: In the driver's order.
        own_gpu: The place of this process's among them; None: it has none.
        gpu_error: What CUDA said instead.
        addresses: What the host's own name resolves to.
        interface: ``GLOO_SOCKET_IFNAME``.
    """

    local_rank: int
    versions: dict[str, str | None]
    optional: list[str]
    other_apex: bool
    gpus: list[Gpu]
    own_gpu: int | None
    gpu_error: str | None
    addresses: list[str]
    interface: str | None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Facts:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**record, "gpus": [Gpu(**gpu) for gpu in record["gpus"]]})


def look(process: ProcessEnvironment) -> Facts:
    """Look at this machine; asking a GPU for its free memory takes some of it."""
    import torch

    versions = {"Python": platform.python_version(), **package_versions()}
    versions |= {"CUDA": torch.version.cuda, "NCCL": None}
    git = git_state(Path(soar_mega.__file__).parents[1])
    revision = git["revision"] if git else None
    versions["soar_mega"] = soar_mega.__version__ + (f" at {revision[:12]}" if revision else "")
    gpus: list[Gpu] = []
    own = error = None
    try:
        if torch.cuda.is_available():
            versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
            own = own_gpu(process.local_rank, torch.cuda.device_count())
            gpus = _gpus({own} if process.world_size > 1 else None)
    except (RuntimeError, AssertionError) as caught:
        error = str(caught).splitlines()[0]
    try:
        addresses = resolve(socket.gethostname())
    except OSError:
        addresses = []
    return Facts(
        process.local_rank,
        versions,
        [name for name in OPTIONAL if is_there(name)],
        find("apex") is not None and not is_there("apex"),
        gpus,
        own,
        error,
        addresses,
        os.environ.get("GLOO_SOCKET_IFNAME"),
    )


def own_gpu(local_rank: int, count: int) -> int | None:
    """The place of a process's GPU among the ``count`` it sees; None: there is none for it."""
    if count == 1:
        return 0  # Slurm may show each task its own device only
    return local_rank if local_rank < count else None


def _gpus(asked: set[int | None] | None) -> list[Gpu]:
    """All that are seen; free memory of those ``asked`` for alone, None: of all."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free = None
        if asked is None or number in asked:
            free = torch.cuda.mem_get_info(number)[0]
        capability = f"{facts.major}.{facts.minor}"
        found.append(Gpu(facts.name, str(facts.uuid), capability, facts.total_memory, free))
    return found


def version_findings(
    facts: Mapping[int, Facts], hosts: Sequence[str], needs: Mapping[str, str]
) -> Iterator[Finding]:
    """Whether everything needed is there, and the same for all ranks.

    Args:
        facts: Of each rank that answered.
        hosts: Of every rank.
        needs: Import name of an optional package -> the setting that asks for it.
    """
    differs = False
    for name in {key: None for one in facts.values() for key in one.versions}:
        by_version: dict[str, list[int]] = {}
        for rank, one in facts.items():
            by_version.setdefault(one.versions.get(name) or "none", []).append(rank)
        if len(by_version) > 1:
            differs = True
            parts = [f"{version} on {ranks_at(r, hosts)}" for version, r in by_version.items()]
            yield Finding(
                "PROBLEM",
                f"versions: {name} is not the same everywhere: {'; '.join(parts)}",
                "give all nodes one environment: VENV (slurm/cluster.env) on storage that all "
                "nodes share, or one container image",
            )
    first = next(iter(facts.values()))
    if lacking := [name for name in _NEEDED if first.versions.get(name) is None]:
        yield Finding(
            "PROBLEM",
            f"versions: not installed: {', '.join(lacking)}",
            "install soar-mega with this Python",
            cause="input",
        )
    torch_range = version_range("torch")
    version = first.versions.get("torch")
    if torch_range is not None and version is not None and not within(version, torch_range):
        yield Finding(
            "note",
            f"versions: torch {version} is outside the {torch_range} that soar-mega is made for; "
            "it may work all the same",
        )
    if not differs:
        shown = [f"{name} {first.versions.get(name) or 'none'}" for name in _SHOWN]
        same = f"; the same on all {len(facts)} ranks" if len(facts) > 1 else ""
        yield Finding("ok", f"versions: {', '.join(shown)}{same}")
    yield from _optional_findings(facts, hosts, needs)


def _optional_findings(
    facts: Mapping[int, Facts], hosts: Sequence[str], needs: Mapping[str, str]
) -> Iterator[Finding]:
    absent, there = [], []
    for name, (shown, way) in OPTIONAL.items():
        without = [rank for rank, one in facts.items() if name not in one.optional]
        if not without:
            there.append(shown)
        elif name in needs:
            where = "" if len(without) == len(facts) else f" on {ranks_at(without, hosts)}"
            yield Finding(
                "PROBLEM",
                f"versions: {needs[name]} needs {shown}, which is not installed{where}",
                f"{way}, or change the setting",
                cause="machine" if where else "input",
            )
        elif len(without) < len(facts):
            absent.append(f"{shown} (on {ranks_at(without, hosts)})")
        else:
            absent.append(shown)
    if there:
        yield Finding("ok", f"optional packages: {', '.join(there)}")
    if absent:
        yield Finding("note", f"optional packages that are not installed: {', '.join(absent)}")
    if any(one.other_apex for one in facts.values()):
        yield Finding(
            "note",
            "the apex that is installed is not NVIDIA's: it has no apex.optimizers.FusedAdam, so "
            "it is of no use here (pip uninstall apex)",
        )


def gpu_findings(
    facts: Mapping[int, Facts], hosts: Sequence[str], device: str
) -> Iterator[Finding]:
    """Whether every rank has a GPU for itself that nobody else uses.

    Args:
        facts: Of each rank that answered.
        hosts: Of every rank.
        device: ``run.device``.
    """
    for rank, one in facts.items():
        if one.gpu_error is not None:
            yield Finding(
                "PROBLEM",
                f"GPUs: {ranks_at([rank], hosts)}: CUDA fails: {one.gpu_error}",
                "look at nvidia-smi and the kernel's log there; leave that node out "
                "(sbatch --exclude) until it is repaired",
            )
    if device == "cpu":
        yield Finding("note", "GPUs: not used, because run.device = cpu")
        return
    lacking = [rank for rank, one in facts.items() if one.own_gpu is None]
    if len(lacking) == len(facts) and not any(one.gpus for one in facts.values()):
        yield _no_gpu(facts, device)
        return
    if lacking:
        counts = [f"{len(facts[rank].gpus)} seen by rank {rank}" for rank in lacking[:4]]
        yield Finding(
            "PROBLEM",
            f"GPUs: none left for {ranks_at(lacking, hosts)} ({', '.join(counts)})",
            "start at most as many processes a node as it has GPUs (--ntasks-per-node and "
            "--gpus-per-node, or torchrun's --nproc-per-node)",
        )
    yield from _shared(facts, hosts)
    yield from _busy(facts, hosts)
    for host in dict.fromkeys(hosts):
        there = [rank for rank in facts if hosts[rank] == host]
        seen = max((len(facts[rank].gpus) for rank in there), default=0)
        if len(facts) > 1 and len(there) < seen:
            text = f"GPUs: {host} has {seen} for {ranks_at(there, hosts)}; the others stay idle"
            yield Finding("note", text)
    own = [one.gpus[one.own_gpu] for one in facts.values() if one.own_gpu is not None]
    if len(facts) == 1:
        own = next(iter(facts.values())).gpus
    kinds: dict[tuple[str, str, int], int] = {}
    for gpu in own:
        kind = (gpu.name, gpu.capability, gpu.total)
        kinds[kind] = kinds.get(kind, 0) + 1
    words = [
        f"{count} x {name} (compute capability {capability}, {total / _GIB:.1f} GiB)"
        for (name, capability, total), count in kinds.items()
    ]
    if words:
        mixed = "; the slowest sets the pace of all" if len(kinds) > 1 else ""
        yield Finding("note" if mixed else "ok", f"GPUs: {', '.join(words)}{mixed}")


def _no_gpu(facts: Mapping[int, Facts], device: str) -> Finding:
    if device == "auto":
        return Finding("note", "GPUs: none, so a run computes on the CPU and talks over gloo")
    built = next(iter(facts.values())).versions.get("CUDA") is not None
    return Finding(
        "PROBLEM",
        "GPUs: run.device = cuda, but torch finds no CUDA device"
        + ("" if built else ": it was built without CUDA"),
        "ask for GPUs (--gpus-per-node), or use run.device = auto or cpu"
        if built
        else "install a torch with CUDA, or use run.device = auto or cpu",
        cause="machine" if built else "input",
    )


def _shared(facts: Mapping[int, Facts], hosts: Sequence[str]) -> Iterator[Finding]:
    """GPUs that are the own one of several ranks."""
    users: dict[str, list[int]] = {}
    for rank, one in facts.items():
        if one.own_gpu is not None:
            users.setdefault(one.gpus[one.own_gpu].uuid, []).append(rank)
    for ranks in users.values():
        if len(ranks) > 1:
            yield Finding(
                "PROBLEM",
                f"GPUs: {ranks_at(ranks, hosts)} have one and the same GPU",
                "start one process for each GPU, and let each see all GPUs of its node or one of "
                "its own (CUDA_VISIBLE_DEVICES, --gpus-per-task)",
            )


def _busy(facts: Mapping[int, Facts], hosts: Sequence[str]) -> Iterator[Finding]:
    """GPUs whose memory somebody else holds."""
    for rank, one in facts.items():
        for number, gpu in enumerate(one.gpus):
            if gpu.free is None or gpu.total - gpu.free <= _BUSY_SHARE * gpu.total:
                continue
            yield Finding(
                "PROBLEM",
                f"GPUs: {ranks_at([rank], hosts)}: others hold {(gpu.total - gpu.free) / _GIB:.1f} "
                f"of {gpu.total / _GIB:.1f} GiB of GPU {number} ({gpu.name})",
                "see who (nvidia-smi) and end what was left behind, or leave the node out "
                "(sbatch --exclude)",
            )


def name_findings(facts: Mapping[int, Facts], hosts: Sequence[str]) -> Iterator[Finding]:
    """Hosts whose own name means nothing to the others, though gloo gives it to them.

    Args:
        facts: Of each rank that answered.
        hosts: Of every rank.
    """
    odd: dict[str, list[str]] = {}
    for host in dict.fromkeys(hosts[rank] for rank in facts):
        one = next(facts[rank] for rank in facts if hosts[rank] == host)
        if not one.interface and (not one.addresses or only_loopback(one.addresses)):
            how = f"resolves to {', '.join(one.addresses)}" if one.addresses else "does not resolve"
            odd.setdefault(how, []).append(host)
    for how, some in odd.items() if len(set(hosts)) > 1 else ():
        more = f" and {len(some) - 8} more" if len(some) > 8 else ""
        text = (
            f"names: a host's own name {how} on {', '.join(some[:8])}{more}, and gloo gives that "
            "address to the other nodes"
        )
        fix = (
            "set GLOO_SOCKET_IFNAME to the network interface between the nodes "
            "(slurm/cluster.env), or take the name off the 127.x line of /etc/hosts (Debian writes "
            "127.0.1.1 there)"
        )
        yield Finding("note", f"{text}; if the all-reduce over gloo does not work: {fix}")
