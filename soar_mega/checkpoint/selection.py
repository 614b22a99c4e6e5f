"""From which checkpoint a run goes on: the newest one that is whole."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from soar_mega.checkpoint.agree import gather, on_rank_0
from soar_mega.checkpoint.errors import CheckpointError, listing
from soar_mega.checkpoint.folders import check_or_hint, committed, find, ignored, put_back
from soar_mega.checkpoint.manifest import (
    MANIFEST,
    TRAINER,
    check,
    read_manifest,
    size_of,
    wrong_hashes,
)
from soar_mega.checkpoint.state_files import INDEX
from soar_mega.parallel.mesh import Mesh

# How long a file that rank 0 sees may take to show up on another machine (NFS caches listings).
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Selection:
    """What ``checkpoint.resume`` means here; the same on every rank.

    Attributes:
        path: The verified checkpoint; None: start fresh.
        damaged: Newer ones that were passed over, and what is wrong with each.
        ignored: Other names in the folder of checkpoints.
        seconds: It took to find and verify it.
    """

    path: Path | None
    damaged: dict[Path, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    seconds: float = 0.0


def select(resume: str, root: Path | str, mesh: Mesh) -> Selection:
    """Find and verify the checkpoint that ``checkpoint.resume`` names; every rank calls it.

    Rank 0 lists the folder, all read a part of the files.

    Args:
        resume: ``none``, ``latest`` or a checkpoint's path.
        root: Folder of the run's checkpoints.
        mesh: This process among all.

    Raises:
        CheckpointError: On every rank: an explicit path that is missing, uncommitted or damaged;
            ``latest`` where there are checkpoints, but none that is whole; files that not all ranks
            see.
    """
    root, began = Path(root), time.perf_counter()

    def candidates() -> tuple[list[str], list[str]]:
        put_back(root)
        if resume == "latest":
            return [str(path) for path in reversed(committed(root))], ignored(root)
        if resume == "none":
            return [], []
        check_or_hint(Path(resume))
        return [resume], []

    what = f"checkpoint.resume = {resume}"
    names, others = on_rank_0(mesh, candidates, what)
    damaged: dict[Path, str] = {}
    for name in names:
        problem = damage_of(Path(name), mesh)
        if problem is None:
            return Selection(Path(name), damaged, others, time.perf_counter() - began)
        damaged[Path(name)] = problem
    if damaged and resume != "latest":
        raise CheckpointError(
            f"{what}: {damaged.popitem()[1]}\nName another checkpoint, or use "
            "checkpoint.resume = latest to go on from the newest one that is whole"
        )
    if damaged:
        raise CheckpointError(
            f"{what}: none of the {len(damaged)} checkpoints in {root} is whole. To begin the run "
            "again, choose another run.dir\n" + "\n".join(damaged.values())
        )
    return Selection(None, damaged, others)


def select_source(path: Path | str, mesh: Mesh) -> Path:
    """The verified checkpoint that a person means by a run folder or a checkpoint; all call it.

    Raises:
        CheckpointError: On every rank: there is none, or a run's newest one is damaged. It starts
            another run, so whether an older one will do is for the person to say.
    """
    what = f"cannot start from {path}"
    found = Path(on_rank_0(mesh, lambda: str(find(path)), what))
    problem = damage_of(found, mesh)
    if problem is not None:
        raise CheckpointError(f"{what}: {problem}\nName another checkpoint")
    return found


def damage_of(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, each rank reading its part; the same answer on all.

    Raises:
        CheckpointError: On every rank: some do not see the files that rank 0 sees. That is no
            damage, and passing the checkpoint over would lose steps for nothing.
    """

    def glance() -> str | None:
        try:
            check(path)
        except CheckpointError as error:
            return str(error)
        return None

    problem = on_rank_0(mesh, glance, f"cannot look at the checkpoint {path}")
    if problem is not None:
        return problem
    unseen, wrong = _my_part(path, mesh)
    everyone = gather((unseen, wrong), mesh)
    blind = {f"rank {rank}: {name}" for rank, (names, _) in enumerate(everyone) for name in names}
    if blind:
        raise CheckpointError(
            f"rank 0 sees the whole checkpoint {path}, but others do not, after {PATIENCE_S:g} s: "
            "put run.dir on storage that all machines share" + listing("not seen", blind)
        )
    damage = [name for _, names in everyone for name in names]
    if damage:
        return f"checkpoint {path} is damaged:" + listing("files", damage)
    return None


def _my_part(path: Path, mesh: Mesh) -> tuple[list[str], list[str]]:
    """Files this rank does not see, and of its share of all files, those that are damaged."""
    until = time.monotonic() + PATIENCE_S
    try:
        while not (path / MANIFEST).is_file() and time.monotonic() < until:
            time.sleep(0.2)
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)], []
    mine = sorted(manifest.files)[mesh.rank :: mesh.world_size]
    needed = {*mine, TRAINER, f"state/{INDEX}"}  # the last two are read by every rank
    unseen = needed
    while unseen := {name for name in unseen if size_of(path / name) != manifest.files[name][0]}:
        if time.monotonic() > until:
            return sorted(unseen), []
        time.sleep(0.2)
    return [], wrong_hashes(path, manifest, mine)
