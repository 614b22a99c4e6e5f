"""Every key of a configuration, its type, default, range and meaning.

Rules between keys that need no world size live here too; those that do are in
:mod:`soar_mega.config.world`. Paths are relative to the working directory.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from soar_mega import hub
from soar_mega.config.data import DataConfig
from soar_mega.config.objective import FlowMatchingConfig, SoarConfig
from soar_mega.config.precision import PrecisionConfig, check_overlap, check_recomputation
from soar_mega.config.section import Section, Text, Texts, broken_rule


class RunConfig(Section):
    """The run as a whole."""

    dir: Text = Field(description="Folder of the run: metrics, checkpoints, resolved config.")
    name: Text | None = Field(None, description="Name in logs and trackers; null: the folder's.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of every random draw of the run.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if there is.")
    deterministic: bool = Field(True, description="Use deterministic kernels only.")


class ModelConfig(Section):
    """Where architecture and starting weights come from."""

    pretrained: Text = Field(
        description="diffusers folder or hub model (owner/name): architecture, VAE, text encoders, "
        "tokenizers, scheduler."
    )
    revision: Text | None = Field(
        None, description="Commit (40 hex digits) of a hub model; null: pretrained is a folder."
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="Start from that folder's transformer weights, or fresh ones."
    )
    init_from: Text | None = Field(
        None, description="Start a new run from this run, checkpoint or export; wins over init."
    )
    init_from_weights: Literal["ema", "plain"] = Field(
        "ema", description="Which weights of init_from."
    )

    @property
    def source(self) -> str:
        """``pretrained`` as ``soar_mega.hub`` takes it: a folder, or ``owner/name@COMMIT``."""
        return self.pretrained if self.revision is None else f"{self.pretrained}@{self.revision}"

    @model_validator(mode="after")
    def _a_hub_model_has_a_commit(self) -> Self:
        if self.revision is None:
            return self
        keys = ("model.revision", "model.pretrained")
        if not hub.HUB_NAME.fullmatch(self.pretrained):
            raise broken_rule(
                f"model.revision = {self.revision} is for models of the Hugging Face hub, but "
                f"model.pretrained = {self.pretrained} is no hub name (owner/name): set "
                "model.revision to null, or name a hub model",
                *keys,
            )
        if not hub.COMMIT.fullmatch(self.revision):
            raise broken_rule(
                f"model.revision = {self.revision} must be a whole commit, 40 hex digits as "
                f"https://huggingface.co/{self.pretrained}/commits/main shows them: a branch or a "
                "tag may move between processes and between restarts",
                *keys,
            )
        return self


class ParallelConfig(Section):
    """How the model is spread over processes; what is left is data parallel."""

    tensor_model_parallel_size: int = Field(
        1,
        ge=1,
        description="Processes that share each layer; each must get a head and an equal width.",
    )
    sequence_parallel: bool = Field(
        False,
        description="Cut activations between tensor-parallel layers by token; none at size 1.",
    )
    tensor_parallel_overlap: bool = Field(
        False,
        description="Tensor-parallel communication of image tokens beside the products it serves "
        "(backend te, sequence_parallel, NVLink).",
    )
    pipeline_model_parallel_size: int = Field(
        1, ge=1, description="Processes that share the layers among them, in stages."
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        None,
        ge=1,
        description="Stages a pipeline rank owns; null: 2 for interleaved_1f1b and zero_bubble_v "
        "(which takes no other), else 1.",
    )
    pipeline_schedule: Literal[
        "1f1b", "interleaved_1f1b", "zero_bubble", "zero_bubble_v", "sequential"
    ] = Field("1f1b", description="Order of a step's passes over the stages.")
    pipeline_layout: Annotated[tuple[int, ...], Field(strict=False)] | None = Field(
        None, description="Layers of each stage, in model order; null: cut by cost."
    )
    distributed_timeout_minutes: float = Field(
        30.0, gt=0, description="Longest wait for another process before the run ends."
    )


class OptimizerConfig(Section):
    """AdamW and the learning-rate schedule."""

    name: Literal["adamw", "apex_fused_adam", "te_fused_adam"] = Field(
        "adamw",
        description="Whose AdamW: torch's fused one, NVIDIA apex' or Transformer Engine's (CUDA).",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled weight decay.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after the warm-up."
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    lr_min_ratio: float = Field(
        0.0, ge=0, le=1, description="Final learning rate of linear and cosine over the peak."
    )


class TrainConfig(Section):
    """Length of the run, batch, clipping, skipped steps, EMA, recomputation."""

    max_train_steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    micro_batch_size: int = Field(ge=1, description="Samples of one pass on one rank.")
    global_batch_size: int = Field(ge=1, description="Samples of one step over all ranks.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    spike_factor: float | None = Field(
        100.0,
        gt=1,
        description="Skip a step whose loss or gradient norm is above this many times its median "
        "over the last 128 accepted steps; null: only what is not finite.",
    )
    max_skipped_steps: int = Field(
        10, ge=0, description="Steps in a row that may be skipped; one more ends the run."
    )
    max_starts_without_progress: int = Field(
        3,
        ge=1,
        description="With checkpoint.resume = latest: crashes in a row from the same step after "
        "which the run is not started again.",
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights.")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="Which activations to recompute in the backward."
    )

    @model_validator(mode="after")
    def _micro_batches_fill_the_global_batch(self) -> Self:
        total, micro = self.global_batch_size, self.micro_batch_size
        if total % micro:
            near = [n for n in (total // micro * micro, -(-total // micro) * micro) if n]
            raise broken_rule(
                f"train.global_batch_size = {total} must be a multiple of train.micro_batch_size = "
                f"{micro}; nearest that work: {' or '.join(map(str, near))}",
                "train.global_batch_size",
                "train.micro_batch_size",
            )
        return self


class CheckpointConfig(Section):
    """Saving and resuming."""

    checkpointing_steps: int = Field(500, ge=1, description="Steps between checkpoints.")
    checkpoints_total_limit: int | None = Field(
        None, ge=1, description="Keep only this many newest checkpoints; null keeps all."
    )
    keep_every_steps: int | None = Field(
        None, ge=1, description="Keep the checkpoints of every so many steps, too."
    )
    keep_best: bool = Field(
        False, description="Keep the checkpoint with the lowest validation loss, too."
    )
    async_save: bool = Field(
        True, description="Write checkpoints while training goes on, from a copy in host memory."
    )
    hash_algorithm: Literal["xxh3-128", "sha256"] = Field(
        "xxh3-128", description="Hash of each file; sha256 is slower and proves more."
    )
    max_failed_saves: int = Field(
        0, ge=0, description="Failed saves in a row (a full disk) that a run survives."
    )
    resume: Text = Field(
        "none", description="none, latest (of run.dir), or the path of a checkpoint."
    )
    allow_fresh: bool = Field(
        True, description="Whether resume = latest begins the run where there is no checkpoint."
    )
    reset_data: bool = Field(
        False, description="When resuming, begin the order of the data anew (samples repeat)."
    )

    @model_validator(mode="after")
    def _kept_steps_are_saved_steps(self) -> Self:
        every, saved = self.keep_every_steps, self.checkpointing_steps
        if every is not None and every % saved:
            raise broken_rule(
                f"checkpoint.keep_every_steps = {every} must be a multiple of "
                f"checkpoint.checkpointing_steps = {saved}, else those steps are never saved; use "
                f"{-(-every // saved) * saved}",
                "checkpoint.keep_every_steps",
                "checkpoint.checkpointing_steps",
            )
        return self


class LoggingConfig(Section):
    """What is reported while training."""

    log_every: int = Field(1, ge=1, description="Steps between console lines.")
    wandb_project: Text | None = Field(None, description="wandb project; null: no wandb.")
    wandb_mode: Literal["online", "offline"] = Field("online", description="wandb's mode.")
    peak_tflops: float | None = Field(
        None, gt=0, description="Peak TFLOP/s of one device, for MFU; null: looked up."
    )
    timeline_step: int | None = Field(
        None,
        ge=1,
        description="Step whose pipeline actions are timed, to <run.dir>/timeline; null: none.",
    )
    timestep_bins: int = Field(10, ge=1, description="Bins of the training loss by noise level.")
    fp8_statistics_steps: int | None = Field(
        100,
        ge=1,
        description="Steps between fp8/* metrics (magnitudes, overflow, underflow); null: none.",
    )
    sample_ids: bool = Field(
        False, description="Write which samples each step trained on, to <run.dir>/sample_ids."
    )


class WatchdogConfig(Section):
    """Longest time without a sign of life; then stacks are written and the process ends."""

    start_minutes: float = Field(60.0, gt=0, description="Until the first step.")
    step_minutes: float = Field(20.0, gt=0, description="One step, its data and its report.")
    validation_minutes: float = Field(
        20.0,
        gt=0,
        description="One microbatch of the validation loss, one picture grid, or one round of an "
        "evaluation.",
    )
    save_minutes: float = Field(60.0, gt=0, description="One checkpoint.")


class ValidationConfig(Section):
    """Validation loss at fixed timesteps with fixed noise, a picture grid, scored pictures."""

    validation_steps: int | None = Field(
        None, ge=1, description="Steps between validation losses; null: off."
    )
    shards: Text | Texts | None = Field(None, description="Held-out shards, as data.shards.")
    num_samples: int = Field(64, ge=1, description="Samples of the validation loss.")
    num_timesteps: int = Field(
        8, ge=1, le=1000, description="Equidistant timesteps of each sample."
    )
    prompts: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        (), description="Prompts of the picture grid."
    )
    image_steps: int | None = Field(
        None, ge=1, description="Steps between picture grids; null: off."
    )
    evaluate_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations (docs/evaluation.md); null: off."
    )
    evaluate_prompts: Text | None = Field(None, description="File of the prompts to draw.")
    evaluate_format: Text = Field(
        "lines", description="Of that file, as --format of tools/evaluate.py."
    )
    evaluate_scorers: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        (), description="What judges the pictures: name or name=location of each."
    )
    num_inference_steps: int = Field(28, ge=1, le=1000, description="Sampling steps of pictures.")
    guidance_scale: float = Field(4.5, ge=0, description="Guidance scale of pictures.")

    @model_validator(mode="after")
    def _has_something_to_validate_on(self) -> Self:
        if self.validation_steps is not None and self.shards is None:
            raise broken_rule(
                f"validation.validation_steps = {self.validation_steps} needs validation.shards, "
                "which is null; name held-out shards or set validation_steps to null",
                "validation.validation_steps",
                "validation.shards",
            )
        if self.image_steps is not None and not self.prompts:
            raise broken_rule(
                f"validation.image_steps = {self.image_steps} needs validation.prompts, which is "
                "empty; give at least one prompt or set image_steps to null",
                "validation.image_steps",
                "validation.prompts",
            )
        if self.evaluate_steps is not None:
            needed = {
                "evaluate_prompts": self.evaluate_prompts,
                "evaluate_scorers": self.evaluate_scorers,
            }
            for name, value in needed.items():
                if not value:
                    raise broken_rule(
                        f"validation.evaluate_steps = {self.evaluate_steps} needs "
                        f"validation.{name}, which is not set; give it or set evaluate_steps to "
                        "null",
                        "validation.evaluate_steps",
                        f"validation.{name}",
                    )
        return self


class Config(Section):
    """A whole configuration; made by :func:`soar_mega.config.load_config`."""

    run: RunConfig = Field(description="The run as a whole.")
    model: ModelConfig = Field(description="Architecture and starting weights.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="Spread over processes.")
    precision: PrecisionConfig = Field(PrecisionConfig(), description="Number formats.")
    objective: Annotated[FlowMatchingConfig | SoarConfig, Field(discriminator="name")] = Field(
        description="What is trained."
    )
    data: DataConfig = Field(description="The training data.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW and its schedule.")
    train: TrainConfig = Field(description="Length, batch, clipping, skipped steps, EMA.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="Saving and resuming.")
    logging: LoggingConfig = Field(LoggingConfig(), description="What is reported.")
    validation: ValidationConfig = Field(ValidationConfig(), description="Validation.")
    watchdog: WatchdogConfig = Field(
        WatchdogConfig(), description="Longest time without a sign of life."
    )

    @model_validator(mode="after")
    def _the_best_is_known(self) -> Self:
        every, saved = self.validation.validation_steps, self.checkpoint.checkpointing_steps
        if self.checkpoint.keep_best and (every is None or saved % every):
            raise broken_rule(
                f"checkpoint.keep_best needs a validation loss at every checkpoint: "
                f"validation.validation_steps = {every} must divide checkpoint.checkpointing_steps "
                f"= {saved}; set it to {saved}",
                "checkpoint.keep_best",
                "validation.validation_steps",
            )
        return self

    @model_validator(mode="after")
    def _transformer_engine_can(self) -> Self:
        check_recomputation(self.precision, self.train.activation_checkpointing)
        check_overlap(self)
        return self

    @property
    def group_size(self) -> int:
        """Consecutive slots that share a picture size: 1 where there is only one size."""
        if self.data.max_aspect_ratio == 1:
            return 1
        return self.data.bucket_group_size or self.train.micro_batch_size

    @model_validator(mode="after")
    def _microbatches_are_of_one_size(self) -> Self:
        group, micro = self.group_size, self.train.micro_batch_size
        if self.data.max_aspect_ratio > 1 and group % micro:
            raise broken_rule(
                f"data.bucket_group_size = {group} must be a multiple of train.micro_batch_size = "
                f"{micro}, because a microbatch has pictures of one size; use {micro} or "
                f"{2 * micro}",
                "data.bucket_group_size",
                "train.micro_batch_size",
            )
        return self
