"""What is wrong with a run folder, and what to do about it: reads only, changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from soar_mega import hub
from soar_mega.checkpoint import store
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.config import Config, ConfigError, load_config
from soar_mega.data.model_folder import FolderError, check_folder
from soar_mega.launch.findings import Finding
from soar_mega.telemetry.metrics import FILE_NAME as METRICS
from soar_mega.telemetry.metrics import read_metrics
from soar_mega.training.requests import SAVE_NOW, STOP_NOW
from soar_mega.training.saving import CHECKPOINTS

RESOLVED = "config.resolved.yaml"
_LEFTOVERS = {
    ".tmp": "being written now, or of a save that was interrupted; the next save removes it",
    ".deleting": "an old checkpoint on its way out; the next save removes it",
    ".replaced": "an older checkpoint of that step; put back on the next start if the newer one "
    "never came",
    ".superseded-": "of steps that a resumed run did again; removed once the run is past that step",
    ".damaged-": "a resumed run passed it over; removed once the run is past that step",
}


def examine(run_dir: Path | str, *, quick: bool = False) -> Iterator[Finding]:
    """Look at a run folder, the slow part (reading checkpoints) finding by finding.

    Args:
        run_dir: ``run.dir`` of the run.
        quick: Compare the sizes of checkpoint files, not their hashes.
    """
    folder = Path(run_dir)
    root = folder / CHECKPOINTS
    if not any((folder / name).exists() for name in (RESOLVED, METRICS, CHECKPOINTS)):
        yield Finding(
            "PROBLEM",
            f"{folder} is no run folder: it has no {RESOLVED}, {METRICS} or {CHECKPOINTS}/",
            "name the run.dir of a run",
        )
        return
    config, finding = _configuration(folder)
    yield finding
    damaged: list[Path] = []
    whole: list[Path] = []
    for path in store.committed(root):
        finding = _checkpoint(path, quick)
        (damaged if finding.level == "PROBLEM" else whole).append(path)
        yield finding
    yield from _leftovers(root)
    newest = whole[-1] if whole else None
    yield _choice(root, newest, damaged)
    record: dict[str, Any] = {}
    if newest is not None:
        record = store.read_extra(newest)
        yield Finding("note", _lineage(record))
    yield from _base_model(record, config)
    yield from _metrics(folder, newest)
    yield from _disk(root, whole, config)
    yield from _requests(folder)


def _configuration(folder: Path) -> tuple[Config | None, Finding]:
    path = folder / RESOLVED
    if not path.is_file():
        return None, Finding("note", f"no {RESOLVED}: the run wrote none yet, or it was removed")
    try:
        return load_config(path), Finding("ok", f"{RESOLVED} is readable by this version")
    except ConfigError as error:
        return None, Finding(
            "PROBLEM",
            f"this version cannot read {path}: {error}",
            "start from the run's own YAML file, corrected as the message says, or with the "
            "version that env.json names",
        )


def _checkpoint(path: Path, quick: bool) -> Finding:
    """One committed checkpoint."""
    try:
        if quick:
            store.check(path)
            wrong = []
        else:
            wrong = store.verify(path)
        if wrong:
            raise CheckpointError(f"checkpoint {path} is damaged:\n  " + "\n  ".join(wrong))
        store.read_extra(path)
    except (CheckpointError, OSError) as error:
        return Finding(
            "PROBLEM",
            str(error),
            f"restore the files from a copy, or remove {path.name}; checkpoint.resume=latest "
            "passes it over",
        )
    how = "sizes as written" if quick else "hashes as written"
    return Finding("ok", f"{path.name}: {size_of(path):,} bytes, {how}")


def size_of(path: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _leftovers(root: Path) -> Iterator[Finding]:
    """Whatever lies beside the committed checkpoints."""
    known = set(store.committed(root))
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path in known:
            continue
        kind = next((what for mark, what in _LEFTOVERS.items() if mark in path.suffix), None)
        if kind is None and path.name.startswith("step-") and path.is_dir():
            kind = "no committed checkpoint: its name is another, or its manifest.json is missing"
        yield Finding("note", f"{path.name}: {kind or 'not of this program; never looked at'}")


def _choice(root: Path, newest: Path | None, damaged: Sequence[Path]) -> Finding:
    """What the next start with ``checkpoint.resume=latest`` does."""
    lead = "checkpoint.resume=latest"
    if newest is None and damaged:
        return Finding(
            "PROBLEM",
            f"{lead} would refuse to start: none of the {len(damaged)} checkpoints in {root} is "
            "whole",
            "restore one from a copy, or begin again in another run.dir",
        )
    if newest is None:
        return Finding("note", f"{lead} would start fresh: there is no checkpoint")
    passed = [path.name for path in damaged if path.name > newest.name]
    over = f", passing over {', '.join(passed)}" if passed else ""
    return Finding("note" if passed else "ok", f"{lead} would go on from {newest.name}{over}")


def _lineage(record: Mapping[str, Any]) -> str:
    """Where the newest checkpoint's weights come from, newest first."""
    lineage = record.get("lineage")
    if not isinstance(lineage, Mapping):
        return "lineage: not recorded"
    parents = lineage.get("parents")
    chain: list[Mapping[str, Any]] = [{k: v for k, v in lineage.items() if k != "parents"}]
    chain += [p for p in parents if isinstance(p, Mapping)] if isinstance(parents, list) else []
    lines = [", ".join(f"{key} {value}" for key, value in one.items()) for one in chain]
    return "lineage: " + "\n  from ".join(lines)


def _base_model(record: Mapping[str, Any], config: Config | None) -> Iterator[Finding]:
    model = record.get("model")
    source = model.get("pretrained") if isinstance(model, Mapping) else None
    if not isinstance(source, str):
        if config is None:
            return
        source = config.model.source
    folder = hub.cached(source)
    if folder is None and hub.parse(source):
        yield Finding(
            "note", f"base model {source} is not in this machine's cache, a start gets it"
        )
        return
    try:
        check_folder(source if folder is None else folder)
    except FolderError as error:
        yield Finding(
            "PROBLEM", str(error), "put it back, or set model.pretrained to its new place"
        )
        return
    yield Finding("ok", f"base model {source} is there")


def _metrics(folder: Path, newest: Path | None) -> Iterator[Finding]:
    """Steps done since the newest whole checkpoint, and steps that were skipped."""
    lines = read_metrics(folder) if (folder / METRICS).is_file() else []
    if not lines:
        yield Finding("note", f"no step in {METRICS}")
        return
    last, saved = lines[-1]["step"], int(newest.name.removeprefix("step-")) if newest else 0
    where = f"{METRICS} ends with step {last}"
    if last > saved:
        where += f"; a start from {newest.name if newest else 'the beginning'} does "
        where += f"{last - saved} of them again"
    yield Finding("note" if last > saved else "ok", where)

    wrong = [line["step"] for line in lines if _not_finite(line)]
    counts = [line.get("health/skipped_steps", 0.0) for line in lines]
    skipped = max(counts)
    if wrong:
        yield Finding(
            "note", f"loss or gradient norm not finite in {len(wrong)} steps: {_some(wrong)}"
        )
    if skipped:
        yield Finding("note", f"{skipped:g} steps were skipped (not finite, or a spike)")
    row = _skipped_at_the_end(counts)
    if row:
        yield Finding(
            "PROBLEM",
            f"the last {row} steps in a row were skipped: the model, or the data there, is sick",
            "look at those steps in the log; go on from an older checkpoint "
            "(checkpoint.resume=PATH) with a lower optimizer.learning_rate or a longer warm-up, or "
            "find the samples with logging.sample_ids=true",
        )


def _not_finite(line: Mapping[str, Any]) -> bool:
    return any(name in line and line[name] is None for name in ("train/loss", "optim/grad_norm"))


def _skipped_at_the_end(counts: Sequence[float]) -> int:
    """Steps, back from the last one, whose count of skipped ones grew."""
    grew = [after > before for before, after in pairwise([0.0, *counts])]
    return next((n for n, skipped in enumerate(reversed(grew)) if not skipped), len(grew))


def _some(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (f", ... {steps[-1]}" if len(steps) > 5 else "")


def _disk(root: Path, whole: Sequence[Path], config: Config | None) -> Iterator[Finding]:
    if not whole:
        return
    limit = config.checkpoint.checkpoints_total_limit if config is not None else None
    yield room_for_checkpoints(root, size_of(whole[-1]), len(whole), limit)


def room_for_checkpoints(folder: Path, size: int, there: int, limit: int | None) -> Finding:
    """Whether the next checkpoint fits on the disk, and as many as will be kept.

    Args:
        folder: On that disk.
        size: Bytes of a checkpoint.
        there: Checkpoints it has already.
        limit: ``checkpoint.checkpoints_total_limit``; None: all are kept, or it is not known.
    """
    free = shutil.disk_usage(folder).free
    # The new one is whole before an old one goes.
    needed = size * (max(limit - there, 0) + 1 if limit is not None else 1)
    kept = f"keeping {limit} (checkpoint.checkpoints_total_limit)" if limit else "the next one"
    text = f"disk: {free:,} bytes free; a checkpoint takes {size:,}, {kept} {needed:,} more"
    if free < needed:
        return Finding(
            "PROBLEM",
            f"{text}: {needed - free:,} bytes are missing",
            "free space, or lower checkpoint.checkpoints_total_limit",
            cause="input",
        )
    if limit is None:
        return Finding("note", f"{text}; all are kept, and {free // size:,} more fit")
    return Finding("ok", text)


def _requests(folder: Path) -> Iterator[Finding]:
    if (folder / STOP_NOW).exists():
        yield Finding(
            "PROBLEM",
            f"{STOP_NOW} lies there: a running job will save and end, and the next start ends at "
            "once",
            f"remove {folder / STOP_NOW} unless the run is to stop",
        )
    if (folder / SAVE_NOW).exists():
        yield Finding("note", f"{SAVE_NOW} lies there: a running job saves after this step")
