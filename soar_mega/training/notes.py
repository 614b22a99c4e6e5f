"""What a run tells people, in words."""

from __future__ import annotations

import math
from pathlib import Path

from soar_mega.checkpoint import store
from soar_mega.checkpoint.diffusers_map import POSITION, mapping
from soar_mega.training.optimizer import learning_rate
from soar_mega.training.requests import STOP_NOW, Agreed
from soar_mega.training.saving import CHECKPOINTS
from soar_mega.training.setup import Run


def skipped(run: Run, step: int) -> str:
    row, limit = run.health.skipped_in_a_row, run.config.train.max_skipped_steps
    return (
        f"step {step} is skipped, number {row} in a row (train.max_skipped_steps = {limit}): "
        f"{run.health.problem}"
    )


def sick(run: Run, step: int) -> str:
    config, folder = run.config, Path(run.config.run.dir)
    healthy = _last_healthy(folder / CHECKPOINTS)
    rate = learning_rate(config.optimizer, step - 1, config.train.max_train_steps)
    way_out = "there is no checkpoint to go back to: start again"
    if healthy is not None:
        way_out = f"go on from the last healthy checkpoint, {healthy}, or an older one"
    return (
        f"{skipped(run, step)}. The run ends, and no skipped step was saved. Lower "
        f"optimizer.learning_rate (now {rate:g}), lengthen optimizer.lr_warmup_steps, or look for "
        "bad samples (logging.sample_ids=true writes which ones a step had, "
        f"{folder / 'bad_samples'} lists those refused); then {way_out}"
    )


def _last_healthy(root: Path) -> Path | None:
    """The newest checkpoint that was made after an accepted step."""
    for path in reversed(store.committed(root)):
        try:
            health = store.read_extra(path).get("health")
        except (OSError, ValueError):  # damaged
            continue
        if health is None or health.get("skipped_in_a_row") == 0:
            return path
    return None


def ended(run: Run, agreed: Agreed, done: int) -> str:
    """Why the run ends early."""
    why = "a signal asked for it"
    if agreed.stop:
        why = f"{Path(run.config.run.dir) / STOP_NOW} asked for it"
    return (
        f"stopped after {done} of {run.config.train.max_train_steps} steps, because {why}: start "
        "again with checkpoint.resume=latest to go on"
    )


def short_lead(lead_s: float, step_s: float, save_s: float) -> str:
    """The job's signal comes too late to save."""
    return (
        f"warning: the job's signal comes {lead_s:g} s before its end, but a step took up to "
        f"{step_s:.1f} s and a checkpoint {save_s:.1f} s: use sbatch --signal=USR1@"
        f"{math.ceil(1.5 * (step_s + save_s))} or more, else what was done since the last "
        "checkpoint is lost"
    )


def beginning(run: Run) -> list[str]:
    """What is trained, on how many processes, and where it goes on from."""
    mesh, config = run.mesh, run.config
    table = mapping(run.checked.architecture)
    parameters = sum(math.prod(entry.shape) for name, entry in table.items() if name != POSITION)
    texts = [
        f"{config.objective.name}: {parameters / 1e6:.1f}M parameters on {mesh.world_size} "
        f"process(es), tensor parallel {mesh.tensor_size}, pipeline parallel "
        f"{mesh.pipeline_size}, data parallel {mesh.data_size}; "
        f"{len(run.checked.data.index)} samples; run folder {config.run.dir}"
    ]
    ignored = run.checked.data.index.ignored()
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
        texts.append(f"not used of the shards: {kinds}")
    texts += [f"passed over: {problem}" for problem in run.selection.damaged.values()]
    if run.selection.ignored:
        texts.append(f"no checkpoints, ignored: {', '.join(run.selection.ignored)}")
    if run.resumed is not None:
        texts.append(
            f"resumed from {run.resumed.path} at step {run.done_steps} (verified in "
            f"{run.selection.seconds:.1f} s, read in {run.resumed.seconds:.1f} s)"
        )
        texts += run.resumed.changes
        texts += [
            f"set aside, as its steps are done again: {path}" for path in run.resumed.set_aside
        ]
    elif config.checkpoint.resume == "latest":
        texts.append(
            f"checkpoint.resume = latest, but {Path(config.run.dir) / CHECKPOINTS} holds no "
            "checkpoint: starting fresh"
        )
    return texts
