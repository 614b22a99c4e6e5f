"""The loop: load, step, report, validate, save."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from soar_mega.checkpoint.diffusers_map import POSITION, mapping
from soar_mega.config import Config, ConfigError, dump_yaml
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.provenance import write_environment
from soar_mega.pipeline.recorder import Recorder
from soar_mega.pipeline.timeline import Timeline
from soar_mega.pipeline.timeline_picture import draw
from soar_mega.pipeline.trace import write_trace
from soar_mega.telemetry.files import put_aside
from soar_mega.telemetry.flops import (
    forward_flops,
    known_peak_tflops,
    model_flops_utilisation,
    training_factor,
)
from soar_mega.telemetry.metrics import MetricsWriter
from soar_mega.telemetry.progress import Progress
from soar_mega.telemetry.tracking import NoTracker, Tracker, open_tracker
from soar_mega.training import saving
from soar_mega.training.setup import (
    Run,
    build,
    check,
    device_of,
    start_processes,
    timeout_of,
)
from soar_mega.training.validation import Validation


def train(config: Config) -> None:
    """Run the configuration to its last step.

    Raises:
        ConfigError: Before any training, on every rank alike.
        NotFiniteError: The loss or gradient is not finite; nothing of that step was kept.
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
        _loop(run, process)
    finally:
        run.close()
    # Not after an error: the others may never come, and the message must not wait for them.
    if dist.is_initialized():
        dist.destroy_process_group()


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


class _Reporter:
    """Rank 0's metrics file, console and tracker; silent elsewhere."""

    def __init__(self, run: Run, process: ProcessEnvironment) -> None:
        config = run.config
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        self._tracker: Tracker = NoTracker()
        self._folder: Path | None = None
        if run.mesh.rank != 0:
            return
        folder = self._folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        resolved = folder / "config.resolved.yaml"
        if not resolved.exists() or resolved.read_text() != dump_yaml(config):
            put_aside(resolved)
            resolved.write_text(dump_yaml(config))
        write_environment(folder, process)
        self._writer = MetricsWriter(folder, run.done_steps)
        self._tracker = open_tracker(
            config.logging,
            folder,
            name=config.run.name,
            config=config.model_dump(mode="json"),
            resumed=run.resumed is not None,
        )
        self._progress = Progress(
            config.train.max_train_steps, run.done_steps, every=config.logging.log_every
        )

    def note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.note(text)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is not None and self._progress is not None:
            self._writer.write(step, metrics)
            self._tracker.log(step, metrics)
            self._progress.update(step, metrics)

    def picture(self, step: int, path: Path | None) -> None:
        if path is not None:
            self._tracker.log_image(step, "val/pictures", path)
            self.note(f"pictures of step {step}: {path}")

    def timeline(self, step: int, timeline: Timeline | None) -> None:
        """Write a recorded step as data, picture and trace."""
        if timeline is None or self._folder is None:
            return
        path = self._folder / "timeline" / f"step_{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        timeline.save(path)
        title = f"{timeline.name}, step {step}, bubble {timeline.bubble:.1%}"
        draw(timeline, path.with_suffix(".svg"), title)
        write_trace(path.with_suffix(".trace.json"), [timeline])
        self.note(f"timeline of step {step}: {path.with_suffix('.svg')}")

    def close(self) -> None:
        if self._writer is not None and self._progress is not None:
            self._progress.close()
            self._writer.close()
            self._tracker.finish(0 if sys.exc_info()[0] is None else 1)


def _loop(run: Run, process: ProcessEnvironment) -> None:
    config = run.config
    reporter = _Reporter(run, process)
    try:
        _announce(run, reporter)
        validation = Validation(run)
        flops = training_factor(config.objective) * _sample_flops(run)
        last = config.train.max_train_steps
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
            else:
                reporter.note(f"step {step + 1}: no sample of it can be used, so nothing is learnt")
            if run.mesh.device.type == "cuda":
                torch.cuda.synchronize()  # else the update counts as the next step's load
            ended = time.perf_counter()
            metrics |= _speed(run, flops, ended - began, loaded - began)
            done = step + 1
            if recorder is not None and microbatches:
                reporter.timeline(done, run.stepper.pipeline.gather_timeline(recorder))
            if validation.is_due(done):
                metrics |= validation.losses()
            reporter.step(done, metrics)
            if done % config.checkpoint.checkpointing_steps == 0 or done == last:
                stall = run.saver.save(done, metrics.get("val/loss"))
                reporter.note(f"saving step {done}; training stood still for {stall:.2f} s")
            if validation.pictures_due(done):
                reporter.picture(done, validation.pictures(done))
            for note in run.saver.notes():
                reporter.note(note)
        run.saver.finish()
        for note in run.saver.notes():
            reporter.note(note)
        if run.done_steps >= last:
            reporter.note(f"nothing to do: {run.done_steps} of {last} steps are done")
    finally:
        reporter.close()


def _announce(run: Run, reporter: _Reporter) -> None:
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
    if run.resumed is not None:
        reporter.note(f"resumed from {run.resumed.path} at step {run.done_steps}")
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
