"""The loop: load, step, report, validate, save."""

from __future__ import annotations

import hashlib
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from soar_mega.checkpoint import store
from soar_mega.checkpoint.diffusers_map import POSITION, mapping
from soar_mega.config import Config, ConfigError, dump_yaml
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.parallel.errors import waiting_for
from soar_mega.pipeline.recorder import Recorder
from soar_mega.telemetry.flops import (
    forward_flops,
    known_peak_tflops,
    model_flops_utilisation,
    training_factor,
)
from soar_mega.training import saving
from soar_mega.training.health import SickRunError
from soar_mega.training.optimizer import learning_rate
from soar_mega.training.reporter import Reporter
from soar_mega.training.requests import STOP_NOW, Requests
from soar_mega.training.setup import (
    Run,
    build,
    check,
    device_of,
    start_processes,
    timeout_of,
)
from soar_mega.training.validation import Validation


def train(config: Config) -> bool:
    """Run the configuration to its last step.

    Returns:
        Whether it got there; False: somebody asked it to stop before.

    Raises:
        ConfigError: Before any training, on every rank alike.
        SickRunError: Too many steps in a row had to be skipped; nothing was saved after them.
    """
    process = ProcessEnvironment.read(os.environ)
    device = device_of(config, process)
    problem = checked = None
    try:
        checked = check(config, process)
    except (ValueError, OSError) as error:
        problem = str(error)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch 2.11 asks for it
        torch.use_deterministic_algorithms(True)
    start_processes(process, device, timeout_of(config))
    _agree(problem)
    assert checked is not None
    _agree_on_steps(config, checked.data.fingerprint())
    try:
        run = build(config, checked, device)
    except ValueError as error:  # whatever a room refuses is the user's to mend
        raise ConfigError(str(error)) from error
    try:
        finished = _loop(run, process)
    except SickRunError:
        _end_together()
        raise
    finally:
        run.feed.close()
    if not finished:
        _end_together()
    # Not after an error: the others may never come, and the message must not wait for them.
    if dist.is_initialized():
        dist.destroy_process_group()
    return finished


def _end_together() -> None:
    """Wait for all ranks before an end that is not 0; each of them must be about to end so.

    torchrun kills the others when the first one is gone, and rank 0 has its tracker to close and
    the reason to tell.
    """
    if dist.is_initialized():
        with waiting_for("every other process, to end together"):
            dist.barrier()


def _agree(problem: str | None) -> None:
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


def _agree_on_steps(config: Config, data: str) -> None:
    """Every rank will do the same steps on the same samples: else they would wait for each other
    in the middle of the run, or train on other samples than they should.

    Raises:
        ConfigError: On every rank, naming those that differ from rank 0.
    """
    if not dist.is_initialized():
        return
    known = {
        "the samples of data.shards or data.sources": data,
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


def _loop(run: Run, process: ProcessEnvironment) -> bool:
    """The steps that are left; whether all of them were done.

    A checkpoint that is due after a skipped step waits for the next accepted one (see ``Health``),
    one that somebody asked for too. At the end of the run, or when it is told to stop, there is no
    waiting: the state is saved with what ``Health`` knows of it, so that the run can go on there.
    """
    config, health, saver = run.config, run.health, run.saver
    reporter = Reporter(run, process)
    try:
        _announce(run, reporter)
        last = config.train.max_train_steps
        if run.done_steps >= last:
            reporter.note(f"nothing to do: {run.done_steps} of {last} steps are done")
            return True
        requests = Requests(Path(config.run.dir), run.mesh)
        agreed = requests.agree()
        if agreed.stop:  # nothing to save: it came from a checkpoint, or starts the same way again
            reporter.note(_stopped(run, run.done_steps), *requests.answered(agreed))
            return False
        validation = Validation(run)
        flops = training_factor(config.objective) * _sample_flops(run)
        save_due = False
        for step in range(run.done_steps, last):
            began = time.perf_counter()
            microbatches = run.feed.load(step)
            loaded = time.perf_counter()
            recorder = None
            if step + 1 == config.logging.timeline_step:
                recorder = Recorder(run.mesh.device)
            metrics = run.feed.metrics
            if microbatches:
                metrics |= run.stepper.run(step, microbatches, recorder)
                if health.problem is not None:
                    reporter.note(_skipped(run, step + 1))
            else:
                reporter.note(f"step {step + 1}: no sample of it can be used, so nothing is learnt")
            if run.mesh.device.type == "cuda":
                torch.cuda.synchronize()  # else the update counts as the next step's load
            ended = time.perf_counter()
            metrics |= health.metrics | _speed(run, flops, ended - began, loaded - began)
            done = step + 1
            if recorder is not None and microbatches:
                reporter.timeline(done, run.stepper.pipeline.gather_timeline(recorder))
            if validation.is_due(done):
                metrics |= validation.losses()
            reporter.step(done, metrics)
            if health.exhausted:
                raise SickRunError(_sick(run, done))
            agreed = requests.agree(failed=saver.failed)
            if agreed.failed:
                saver.settle()
            save_due |= agreed.save or done % config.checkpoint.checkpointing_steps == 0
            if agreed.stop or done == last or (save_due and health.ok):
                saver.save(done, metrics.get("val/loss"))
                save_due = False
                if agreed.save or agreed.stop:  # who asked for it wants it on the disk
                    saver.settle()
                    reporter.note(*requests.answered(agreed))
            elif save_due:
                reporter.note("a checkpoint is due and waits for an accepted step")
            reporter.note(*saver.notes())
            if validation.pictures_due(done):
                reporter.picture(done, validation.pictures(done))
            if agreed.stop and done < last:
                saver.finish()
                reporter.note(*saver.notes(), _stopped(run, done))
                return False
        saver.finish()
        return True
    finally:
        # A checkpoint that is being written is worth the wait, whatever went wrong.
        saver.join()
        reporter.note(*saver.notes())
        reporter.close()


def _skipped(run: Run, step: int) -> str:
    row, limit = run.health.skipped_in_a_row, run.config.train.max_skipped_steps
    return (
        f"step {step} is skipped, number {row} in a row (train.max_skipped_steps = {limit}): "
        f"{run.health.problem}"
    )


def _sick(run: Run, step: int) -> str:
    config, folder = run.config, Path(run.config.run.dir)
    healthy = _last_healthy(folder / saving.CHECKPOINTS)
    rate = learning_rate(config.optimizer, step - 1, config.train.max_train_steps)
    way_out = "there is no checkpoint to go back to: start again"
    if healthy is not None:
        way_out = f"go on from the last healthy checkpoint, {healthy}, or an older one"
    return (
        f"{_skipped(run, step)}. The run ends, and no skipped step was saved. Lower "
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


def _stopped(run: Run, done: int) -> str:
    last = run.config.train.max_train_steps
    return (
        f"stopped after {done} of {last} steps, because {Path(run.config.run.dir) / STOP_NOW} "
        "asked for it: start again with checkpoint.resume=latest to go on"
    )


def _announce(run: Run, reporter: Reporter) -> None:
    mesh, config = run.mesh, run.config
    table = mapping(run.checked.architecture)
    parameters = sum(math.prod(entry.shape) for name, entry in table.items() if name != POSITION)
    reporter.note(
        f"{config.objective.name}: {parameters / 1e6:.1f}M parameters on {mesh.world_size} "
        f"process(es), tensor parallel {mesh.tensor_size}, pipeline parallel "
        f"{mesh.pipeline_size}, data parallel {mesh.data_size}; "
        f"{len(run.checked.data.index)} samples; run folder {config.run.dir}"
    )
    ignored = run.checked.data.index.ignored()
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
        reporter.note(f"not used of the shards: {kinds}")
    for problem in run.selection.damaged.values():
        reporter.note(f"passed over: {problem}")
    if run.selection.ignored:
        reporter.note(f"no checkpoints, ignored: {', '.join(run.selection.ignored)}")
    if run.resumed is not None:
        reporter.note(
            f"resumed from {run.resumed.path} at step {run.done_steps} (verified in "
            f"{run.selection.seconds:.1f} s, read in {run.resumed.seconds:.1f} s)",
            *(f"set aside, as its steps are done again: {path}" for path in run.resumed.set_aside),
        )
    elif config.checkpoint.resume == "latest":
        reporter.note(
            f"checkpoint.resume = latest, but {Path(config.run.dir) / saving.CHECKPOINTS} holds no "
            "checkpoint: starting fresh"
        )


def _sample_flops(run: Run) -> int:
    architecture = run.checked.architecture
    _, height, width = run.facts.latent_shape(run.config.data.resolution)
    return forward_flops(
        architecture,
        height * width // architecture.patch_size**2,
        run.feed.empty.text_BTE.shape[1],
    )


def _speed(run: Run, flops: int, seconds: float, waited: float) -> dict[str, float]:
    config = run.config
    rate = config.train.global_batch_size / seconds
    metrics = {
        "perf/step_time_s": seconds,
        "perf/samples_per_s": rate,
        "perf/data_wait_pct": 100.0 * waited / seconds,
    }
    peak = config.logging.peak_tflops
    if peak is None and run.mesh.device.type == "cuda":
        peak = known_peak_tflops(torch.cuda.get_device_name(run.mesh.device))
    if peak is not None:
        metrics["perf/mfu"] = model_flops_utilisation(rate, flops, run.mesh.world_size, peak)
    return metrics
