"""The loop: load, step, report, validate, save."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import torch

from soar_mega.checkpoint.agree import on_rank_0
from soar_mega.config import Config, ConfigError
from soar_mega.data.errors import TooManyBadSamplesError
from soar_mega.evaluation.scoring import ScoringError
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.processes import device_of, leave_processes, start_processes
from soar_mega.launch.signals import Signals, signal_lead
from soar_mega.launch.watchdog import Watchdog
from soar_mega.pipeline.recorder import Recorder
from soar_mega.telemetry.flops import (
    forward_flops,
    known_peak_tflops,
    model_flops_utilisation,
    training_factor,
)
from soar_mega.training import notes
from soar_mega.training.evaluation import Evaluation
from soar_mega.training.evaluation_inputs import fingerprint
from soar_mega.training.health import SickRunError
from soar_mega.training.optimizer import check_optimizer
from soar_mega.training.precision import check_backend
from soar_mega.training.reporter import Reporter
from soar_mega.training.requests import Requests
from soar_mega.training.setup import (
    Run,
    build,
    check,
    timeout_of,
)
from soar_mega.training.starts import StuckRunError, count_start, forget_starts
from soar_mega.training.together import agree_on_problem, agree_on_steps, end_together
from soar_mega.training.validation import Validation

Outcome = Literal["finished", "stopped", "interrupted"]


def train(config: Config, signals: Signals) -> Outcome:
    """Run the configuration to its last step.

    Args:
        config: The run.
        signals: Whether this process was asked to end.

    Returns:
        How far it got: ``stopped`` by a person's file, ``interrupted`` by a signal; saved in both.

    Raises:
        ConfigError: Before any training, on every rank alike.
        SickRunError: Too many steps in a row had to be skipped; nothing was saved after them.
        StuckRunError: Earlier starts crashed from the same step.
    """
    process = ProcessEnvironment.read(os.environ)
    with Watchdog(config.watchdog, Path(config.run.dir), process.rank) as watchdog:
        return _train(config, process, signals, watchdog)


def _train(
    config: Config, process: ProcessEnvironment, signals: Signals, watchdog: Watchdog
) -> Outcome:
    device = device_of(config.run.device, process)
    if config.parallel.tensor_parallel_overlap:
        # So that communication is launched before the product beside it; read with CUDA's context.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    problem = checked = None
    try:
        check_backend(config.precision, device)
        check_optimizer(config.optimizer, device)
        checked = check(config, process)
    except (ValueError, OSError) as error:
        problem = str(error)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch 2.11 asks for it
        # Of Transformer Engine's attention; read when it is made.
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        torch.use_deterministic_algorithms(True)
    start_processes(process, device, timeout_of(config))
    agree_on_problem(problem)
    assert checked is not None
    agree_on_steps(config, checked.data.fingerprint(), fingerprint(checked.evaluated))
    try:
        run = build(config, checked, device)
    except ValueError as error:  # whatever a room refuses is the user's to mend
        raise ConfigError(str(error)) from error
    try:
        _count_start(run)
        outcome = _loop(run, process, signals, watchdog)
    except (SickRunError, StuckRunError, TooManyBadSamplesError):
        end_together()
        raise
    finally:
        run.feed.close()
    if run.mesh.rank == 0:
        forget_starts(Path(config.run.dir))
    if outcome != "finished":
        end_together()
    # Not after an error: the others may never come, and the message must not wait for them.
    leave_processes()
    return outcome


def _count_start(run: Run) -> None:
    """Refuse a start that can only crash once more.

    Raises:
        StuckRunError: On every rank alike.
    """
    config = run.config
    if config.checkpoint.resume != "latest":  # a person starts it, and sees it crash
        return
    folder, limit = Path(config.run.dir), config.train.max_starts_without_progress
    problem = on_rank_0(
        run.mesh, lambda: count_start(folder, run.done_steps, limit), "counting the starts"
    )
    if problem is not None:
        raise StuckRunError(problem)


def _loop(run: Run, process: ProcessEnvironment, signals: Signals, watchdog: Watchdog) -> Outcome:
    """The steps that are left.

    A checkpoint that is due after a skipped step waits for the next accepted one (see ``Health``),
    one that somebody asked for too. At the end of the run, or when it is told to stop, there is no
    waiting: the state is saved with what ``Health`` knows of it, so that the run can go on there.
    """
    config, health, saver = run.config, run.health, run.saver
    reporter = Reporter(run, process)
    try:
        reporter.note(*notes.beginning(run))
        last = config.train.max_train_steps
        if run.done_steps >= last:
            reporter.note(f"nothing to do: {run.done_steps} of {last} steps are done")
            return "finished"
        requests = Requests(Path(config.run.dir), run.mesh)
        agreed = requests.agree(leave=signals.received is not None)
        # Nothing to save: it came from a checkpoint, or starts the same way again.
        if agreed.stop or agreed.leave:
            reporter.note(notes.ended(run, agreed, run.done_steps), *requests.answered(agreed))
            return "stopped" if agreed.stop else "interrupted"
        validation, evaluation = Validation(run), Evaluation(run)
        flops = training_factor(config.objective) * _sample_flops(run)
        save_due, slowest_s, lead_s = False, 0.0, signal_lead(os.environ)

        def leaves() -> bool:
            return requests.agree(leave=signals.received is not None).leave

        for step in range(run.done_steps, last):
            watchdog.enter("step")
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
                    reporter.note(notes.skipped(run, step + 1))
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
                watchdog.enter("validation")
                metrics |= validation.losses(watchdog.alive)
                watchdog.enter("step")
            if evaluation.is_due(done):
                watchdog.enter("validation")
                started = time.perf_counter()
                try:
                    metrics |= evaluation.measure(watchdog.alive, leaves)
                except ScoringError as error:
                    reporter.note(f"evaluation of step {done}: {error}; training goes on")
                began += time.perf_counter() - started  # it can be broken off
                watchdog.enter("step")
            reporter.step(done, metrics)
            if health.exhausted:
                raise SickRunError(notes.sick(run, done))
            since_last_look = time.perf_counter() - began
            agreed = requests.agree(failed=saver.failed, leave=signals.received is not None)
            leaving = (agreed.stop or agreed.leave) and done < last
            watchdog.enter("save")
            if agreed.failed:
                saver.settle()
            save_due |= agreed.save or done % config.checkpoint.checkpointing_steps == 0
            if leaving or done == last or (save_due and health.ok):
                saver.save(done, metrics.get("val/loss"))
                save_due = False
                if agreed.save or leaving:  # who asked for it wants it on the disk
                    saver.settle()
                reporter.note(*requests.answered(agreed))
            elif save_due:
                reporter.note("a checkpoint is due and waits for an accepted step")
            reporter.note(*saver.notes())
            if step > run.done_steps:  # the first step warms up
                slowest_s = max(slowest_s, since_last_look)
            if lead_s is not None and slowest_s + saver.slowest_s > lead_s:
                reporter.note(notes.short_lead(lead_s, slowest_s, saver.slowest_s))
                lead_s = None
            if validation.pictures_due(done) and not agreed.leave:  # who has to go is in a hurry
                watchdog.enter("validation")
                reporter.picture(done, validation.pictures(done))
            if leaving:
                saver.finish()
                reporter.note(*saver.notes(), notes.ended(run, agreed, done))
                return "stopped" if agreed.stop else "interrupted"
        watchdog.enter("save")
        saver.finish()
        return "finished"
    finally:
        # A checkpoint that is being written is worth the wait, whatever went wrong.
        saver.join()
        reporter.note(*saver.notes())
        reporter.close()


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
