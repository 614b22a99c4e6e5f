"""From a configuration to everything a run needs, with all that can be refused refused first."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from soar_mega import hub
from soar_mega.checkpoint.importer import load_diffusers_transformer, load_weights
from soar_mega.checkpoint.selection import Selection
from soar_mega.checkpoint.weight_sources import ancestors, read_transformer_config
from soar_mega.config import Config, ConfigError
from soar_mega.config.data import RESOLUTION_STEP, DataConfig
from soar_mega.data.buckets import make_buckets
from soar_mega.data.encoded.read import EncodedSet
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.model_folder import ModelFacts, check_folder
from soar_mega.data.shards.index import ShardIndex, build_index
from soar_mega.data.sources import TrainingData, open_encoded, open_training_data
from soar_mega.evaluation.interface import Prompt
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.init import initialise
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.pipeline.actions import Schedule
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.training.evaluation_inputs import load_scorers, read_evaluated
from soar_mega.training.feed import DTYPES, Feed
from soar_mega.training.health import Health
from soar_mega.training.layout import check_layout, cut_model
from soar_mega.training.precision import block_call, make_backend
from soar_mega.training.resuming import Resumed, find, resume
from soar_mega.training.saving import Saver
from soar_mega.training.step import Stepper


def timeout_of(config: Config) -> timedelta:
    """Longest wait for another process."""
    return timedelta(minutes=config.parallel.distributed_timeout_minutes)


@dataclass(frozen=True)
class Checked:
    """What was found out before any process group, weight or encoder was touched."""

    folder: Path  # of model.pretrained
    architecture: MMDiTConfig
    data: TrainingData
    validation_index: ShardIndex | None
    validation_set: EncodedSet | None  # where validation_index is of one
    evaluated: tuple[Prompt, ...] = ()  # of evaluations
    scorers: tuple[Any, ...] = ()  # the same; loaded, so that what fails does before the start


def check(config: Config, process: ProcessEnvironment) -> Checked:
    """Everything that can be refused without talking to other ranks; the same on all of them.

    A model of the hub is downloaded here, by one process of each machine.

    Raises:
        ConfigError, ValueError: The first problem found, naming setting, value, rule and fix.
    """
    checked = check_inputs(config, process.world_size)
    checked = replace(checked, scorers=load_scorers(config, checked.evaluated, process))
    _check_run_folder(config, process)  # last: what is refused leaves no folder behind
    return checked


def check_inputs(config: Config, world_size: int) -> Checked:
    """What ``check`` does, but for optional packages, scorers and the run folder; writes nothing.

    Raises:
        ConfigError, ValueError: As ``check``.
    """
    folder = hub.resolve(config.model.source, setting="model.pretrained")
    check_folder(folder)
    architecture = MMDiTConfig.from_diffusers(read_transformer_config(folder))
    check_layout(config, architecture, world_size)
    check_resolution(config.data, architecture)
    data = open_training_data(
        config.data,
        str(folder),
        seed=config.run.seed,
        group_size=config.group_size,
    )
    validation = config.validation
    validation_index = validation_set = None
    if validation.validation_steps is not None and validation.shards is not None:
        setting = "validation.shards"
        validation_index = build_index(validation.shards, setting=setting, files=data.index.files)
        if validation.num_samples > len(validation_index):
            raise ConfigError(
                f"validation.num_samples = {validation.num_samples}, but validation.shards hold "
                f"{len(validation_index)} samples: lower it or add shards"
            )
        if validation_index.encoded:
            validation_set = open_encoded(
                validation_index, config.data, str(folder), setting=setting
            )
    evaluated = read_evaluated(validation)
    return Checked(folder, architecture, data, validation_index, validation_set, evaluated)


def _check_run_folder(config: Config, process: ProcessEnvironment) -> None:
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb_project = {config.logging.wandb_project} needs wandb, which "
            "is not installed: install soar-mega[wandb], or set it to null"
        )
    if process.rank == 0:
        try:
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=config.run.dir):
                pass
        except OSError as error:
            raise ConfigError(f"run.dir = {config.run.dir} cannot be written: {error}") from error


def check_resolution(data: DataConfig, architecture: MMDiTConfig) -> None:
    """Refuse pictures wider or higher than the model's position table.

    Raises:
        ConfigError: Names the setting, its value and the largest that works.
    """
    room = architecture.pos_embed_max_size
    longest = max(map(max, make_buckets(data.resolution, data.max_aspect_ratio)))
    if longest // RESOLUTION_STEP <= room:
        return
    made, fix = f"data.resolution = {data.resolution}", f"one of at most {room * RESOLUTION_STEP}"
    if data.max_aspect_ratio > 1:
        made += f" with data.max_aspect_ratio = {data.max_aspect_ratio:g}"
        fix = f"sides of at most {room * RESOLUTION_STEP}"
    raise ConfigError(
        f"{made} makes up to {longest // RESOLUTION_STEP} image tokens a side, but the position "
        f"table of model.pretrained holds {room} x {room} (pos_embed_max_size): use {fix}, or "
        "another model"
    )


@dataclass
class Run:
    """A run ready for its next step.

    Attributes:
        done_steps: Steps already done (of the checkpoint it was resumed from).
        facts: Of the model folder.
        encoders: Where something is encoded or decoded while training.
        saver: Of checkpoints.
        selection: What was found to go on from, and what was passed over.
        resumed: What it goes on from, or None.
    """

    config: Config
    mesh: Mesh
    stepper: Stepper
    feed: Feed
    facts: ModelFacts
    encoders: FrozenEncoders | None
    checked: Checked
    done_steps: int
    saver: Saver
    selection: Selection
    resumed: Resumed | None

    @property
    def health(self) -> Health:
        """Whether steps go well."""
        return self.stepper.health


def build(config: Config, checked: Checked, device: torch.device) -> Run:
    """Model, weights, optimizer and data of a run; every rank calls it."""
    parallel = config.parallel
    mesh = Mesh.build(
        parallel.tensor_model_parallel_size,
        device,
        timeout_of(config),
        parallel.pipeline_model_parallel_size,
    )
    selection = find(config, mesh)
    facts, encoders = ModelFacts.read(checked.folder), None
    if _needs_encoders(config, checked):
        encoders = FrozenEncoders.load(
            checked.folder, device=device, dtype=DTYPES[config.precision.compute_dtype]
        )
    shift = config.objective.shift if config.objective.shift is not None else facts.shift
    objective = make_objective(config.objective, shift=shift, seed=config.run.seed)
    share = config.train.global_batch_size // mesh.data_size
    schedule = build_schedule(
        parallel.pipeline_schedule,
        objective.passes(),
        ranks=mesh.pipeline_size,
        microbatches=share // config.train.micro_batch_size,
        virtual=parallel.virtual_pipeline_model_parallel_size,
    )
    stages = _own_stages(config, checked.architecture, facts, mesh, schedule)
    resuming = selection.path is not None
    lineage = [] if resuming else _starting_weights(config, checked.folder, stages, mesh)
    parameters = ShardedParameters(
        stages,
        mesh,
        DTYPES[config.precision.compute_dtype],
        DTYPES[config.precision.grad_reduce_dtype],
    )
    pipeline = Pipeline(stages, mesh, schedule)
    stepper = Stepper(config, mesh, stages, pipeline, parameters, objective)
    done_steps, saved, resumed, fingerprint = 0, None, None, checked.data.fingerprint()
    if resuming:
        resumed = resume(stepper, selection, fingerprint)
        done_steps, lineage = resumed.steps, resumed.lineage
        saved = None if config.checkpoint.reset_data else resumed.data or {}
        stepper.health = _health(config, resumed)
    feed = Feed(config, mesh, checked.data, facts, encoders, step=done_steps, saved=saved)
    saver = Saver(stepper, lineage, fingerprint, lambda: feed.state)
    return Run(
        config, mesh, stepper, feed, facts, encoders, checked, done_steps, saver, selection, resumed
    )


def _health(config: Config, resumed: Resumed) -> Health:
    if resumed.health is None:
        return Health(config.train)
    try:
        return Health.from_state(resumed.health, config.train)
    except ValueError as error:
        raise ConfigError(
            f"checkpoint.resume = {resumed.path}: {error}. Use another checkpoint"
        ) from error


def _needs_encoders(config: Config, checked: Checked) -> bool:
    """Encoded sets save their time and memory, unless pictures are drawn or validated on."""
    pictures = checked.validation_index is not None and not checked.validation_index.encoded
    draws = (config.validation.image_steps, config.validation.evaluate_steps) != (None, None)
    return checked.data.encoded is None or pictures or draws


def _own_stages(
    config: Config,
    architecture: MMDiTConfig,
    facts: ModelFacts,
    mesh: Mesh,
    schedule: Schedule,
) -> list[MMDiTStage]:
    """The stages this rank owns, by chunk, without weights."""
    _, height, width = facts.latent_shape(config.data.resolution)
    image_tokens = height * width // architecture.patch_size**2
    text_tokens = facts.text_tokens(config.data.max_sequence_length)
    cut = cut_model(config, architecture, image_tokens, text_tokens)
    placement = schedule.step.placement
    backend = make_backend(config, architecture, mesh, schedule, image_tokens)
    call_block = block_call(config)
    return [
        MMDiTStage(
            architecture,
            mesh,
            backend,
            layers=cut[placement.stage(mesh.pipeline_rank, chunk)],
            sequence_parallel=config.parallel.sequence_parallel,
            activation_checkpointing=config.train.activation_checkpointing,
            call_block=call_block,
        )
        for chunk in range(placement.chunks)
    ]


def _starting_weights(
    config: Config, folder: Path, stages: Sequence[MMDiTStage], mesh: Mesh
) -> list[dict[str, Any]]:
    """Fill the stages by the ``model`` section; returns the ancestors to record, newest first."""
    model = config.model
    if model.init_from is not None:
        return load_weights(model.init_from, stages, mesh, model.init_from_weights)
    if model.init == "random":
        for stage in stages:
            initialise(stage, config.run.seed)
        return [{"fresh weights": f"seed {config.run.seed}"}]
    load_diffusers_transformer(folder, stages, mesh)
    here, *older = ancestors(folder)
    return [{**here, "pretrained": hub.recorded(model.source)}, *older]
