"""Turns pictures with captions into balanced WebDataset shards with an index beside each.

1. List what the input offers (``prepare_sources``) and take a fingerprint of the list.
2. Check every candidate (``prepare_check``), in chunks that are kept in ``OUT/.checked``.
3. Write ``OUT/refused.jsonl`` and ``OUT/plan.json``: which sample goes where is now fixed.
4. Write the shards that are not complete (``prepare_write``).

Every file appears by rename, so a run that was killed goes on with what is missing, and the result
is, bit for bit, that of an unbroken run with any number of workers.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.prepare.check import Checked, check
from soar_mega.data.prepare.sources import Candidate, list_candidates
from soar_mega.data.prepare.write import ShardJob, is_complete, write_shard
from soar_mega.data.processes import run_parallel
from soar_mega.data.shards.write_index import PARTIAL, dump, replacing

PLAN_VERSION = 1
# About 350 bytes each in an index file, which may have MAX_INDEX_BYTES.
MAX_SAMPLES_PER_SHARD = 50_000
CHUNK = 256  # candidates checked between two files of progress


@dataclass(frozen=True)
class Report:
    """What a run made.

    Attributes:
        shards: All shards, in order.
        written: How many of them this run wrote; the others were there.
        samples: In all shards.
        refused: Candidates left out, by reason.
    """

    shards: list[Path]
    written: int
    samples: int
    refused: Counter[str]

    def __str__(self) -> str:
        lines = [f"{self.samples} samples in {len(self.shards)} shards ({self.written} new)"]
        lines.append(f"{self.refused.total()} refused, listed in refused.jsonl")
        lines += [f"  {number} {kind}" for kind, number in sorted(self.refused.items())]
        return "\n".join(lines)


def prepare(
    inputs: Sequence[str],
    out: Path,
    *,
    root: str | None = None,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: bool = False,
) -> Report:
    """Write the shards of ``inputs``, or those that a run before this one left to write.

    Args:
        inputs: See ``list_candidates``.
        out: Folder of the result; absent, empty, or of the same run.
        root: See ``list_candidates``.
        prefix: Shards are called ``PREFIX-000000.tar`` and so on.
        samples_per_shard: The most that a shard holds; shards differ by one sample at most.
        workers: Processes; 1 works in this one.
        progress: Whether to show bars.

    Raises:
        DataError: A setting or an input cannot be used, no candidate is accepted, ``out`` is of
            another run or in use by one, or a worker was killed.
        OSError: The disk is full or a file cannot be read.
    """
    if samples_per_shard > MAX_SAMPLES_PER_SHARD:
        raise DataError(
            f"--samples-per-shard={samples_per_shard}: at most {MAX_SAMPLES_PER_SHARD}, so that "
            "the index files stay small enough to be read. Give fewer."
        )
    for name, value in (("--samples-per-shard", samples_per_shard), ("--workers", workers)):
        if value < 1:
            raise DataError(f"{name}={value}: must be at least 1.")
    if not prefix or set(prefix) - set(_PREFIX_LETTERS):
        raise DataError(f"--prefix={prefix!r}: letters, digits, - and _ only. Choose another.")
    for item in inputs:
        if os.path.isdir(item) and out.resolve().is_relative_to(Path(item).resolve()):
            raise DataError(f"--out={str(out)!r}: lies in the input {item!r}. Choose another.")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        candidates = list_candidates(inputs, root)
        return _prepare(candidates, out, prefix, samples_per_shard, workers, progress)


def _prepare(
    candidates: Sequence[Candidate],
    out: Path,
    prefix: str,
    samples_per_shard: int,
    workers: int,
    progress: bool,
) -> Report:
    fingerprint = _fingerprint(candidates, prefix, samples_per_shard)
    for partial in out.glob(f".*{PARTIAL}"):  # of a run that was killed
        partial.unlink()
    plan = _plan_of_before(out, prefix, fingerprint)
    if plan is None:
        plan = _make_plan(candidates, out, fingerprint, samples_per_shard, workers, progress)
    shutil.rmtree(out / ".checked", ignore_errors=True)
    jobs = list(_jobs(plan, candidates, out, prefix))
    missing = [job for job in jobs if not is_complete(job.path)]
    for _ in run_parallel(write_shard, missing, workers, "shards" if progress else ""):
        pass
    samples = len(plan["samples"])
    return Report([job.path for job in jobs], len(missing), samples, Counter(plan["refused"]))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold ``out``'s lock, which the system lets go of when this process ends, however it does.

    Raises:
        DataError: Another run holds it.
    """
    path = out / ".lock"
    while True:
        with open(path, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"--out={str(out)!r}: another run is writing to it. Wait for it to end, or "
                    "choose another folder."
                ) from error
            try:
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    continue  # it was the file of a run that has just ended and removed it
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                path.unlink()
            return


_PREFIX_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"


def _fingerprint(candidates: Sequence[Candidate], prefix: str, samples_per_shard: int) -> str:
    """sha256 (hex) of what the plan follows from. Folders are left out: the input may move."""
    digest = hashlib.sha256(dump([PLAN_VERSION, prefix, samples_per_shard]))
    for candidate in candidates:
        fields = dataclasses.asdict(candidate)
        for part in (fields["image"], fields["caption"]):
            if isinstance(part, dict):
                del part["path"]
        digest.update(dump(fields))
    return digest.hexdigest()


def _plan_of_before(out: Path, prefix: str, fingerprint: str) -> dict[str, Any] | None:
    path = out / "plan.json"
    if not path.exists():
        if any(out.glob(f"{prefix}-*.tar")):
            raise DataError(
                f"--out={str(out)!r}: has shards but no plan.json, so they are not of this "
                "program. Choose an empty folder."
            )
        return None
    plan: dict[str, Any] = json.loads(path.read_bytes())
    if plan["fingerprint"] != fingerprint:
        raise DataError(
            f"--out={str(out)!r}: its plan.json is of another input, --prefix or "
            "--samples-per-shard. Give those again to go on, or choose an empty folder."
        )
    return plan


def _make_plan(
    candidates: Sequence[Candidate],
    out: Path,
    fingerprint: str,
    samples_per_shard: int,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    parts = out / ".checked"
    parts.mkdir(exist_ok=True)
    starts = range(0, len(candidates), CHUNK)
    paths = [parts / f"{start:09d}.json" for start in starts]
    jobs = [
        (path, fingerprint, candidates[start : start + CHUNK])
        for path, start in zip(paths, starts, strict=True)
        if _results(path, fingerprint) is None
    ]
    for _ in run_parallel(_check_chunk, jobs, workers, "checked" if progress else ""):
        pass
    results = [result for path in paths for result in _results(path, fingerprint) or ()]
    samples = [[n, *result] for n, result in enumerate(results) if len(result) > 2]
    refused = {n: result for n, result in enumerate(results) if len(result) == 2}
    with replacing(out / "refused.jsonl") as file:
        for number, (reason, detail) in refused.items():
            line = {"source": candidates[number].source, "reason": reason, "detail": detail}
            file.write(dump(line))
    if not samples:
        raise DataError(
            f"INPUT: none of {len(candidates)} candidates can be used; the reasons are in "
            f"{out / 'refused.jsonl'}. (Of a folder of tars give FOLDER/*.tar.)"
        )
    plan = {
        "version": PLAN_VERSION,
        "fingerprint": fingerprint,
        "shards": -(-len(samples) // samples_per_shard),
        "refused": Counter(reason for reason, _ in refused.values()),
        "samples": samples,  # number of the candidate, and the fields of Checked
    }
    with replacing(out / "plan.json") as file:
        file.write(dump(plan))
    return plan


def _check_chunk(job: tuple[Path, str, Sequence[Candidate]]) -> int:
    path, fingerprint, candidates = job
    results: list[list[Any]] = []
    for candidate in candidates:
        try:
            results.append(list(dataclasses.astuple(check(candidate))))
        except BadSampleError as error:
            results.append([error.kind, str(error)])
    with replacing(path) as file:
        file.write(dump([fingerprint, results]))
    return len(candidates)


def _results(path: Path, fingerprint: str) -> list[list[Any]] | None:
    """A chunk's results, or None where they are absent or of another input."""
    if not path.exists():
        return None
    of, results = json.loads(path.read_bytes())
    return results if of == fingerprint else None


def _jobs(
    plan: dict[str, Any], candidates: Sequence[Candidate], out: Path, prefix: str
) -> Iterator[ShardJob]:
    samples, shards = plan["samples"], plan["shards"]
    for shard in range(shards):
        first, end = (len(samples) * n // shards for n in (shard, shard + 1))
        chosen = [(candidates[number], Checked(*rest)) for number, *rest in samples[first:end]]
        yield ShardJob(out / f"{prefix}-{shard:06d}.tar", first, chosen)
