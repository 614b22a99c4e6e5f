"""The ``precision`` section, and its rules with the other sections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from soar_mega.config.section import Section, broken_rule

if TYPE_CHECKING:
    from soar_mega.config.schema import Config


class PrecisionConfig(Section):
    """Number formats and kernels; master weights and optimizer state are always fp32."""

    compute_dtype: Literal["bf16", "fp32"] = Field("bf16", description="Weights and activations.")
    backend: Literal["torch", "te"] = Field(
        "torch", description="Kernels of the blocks: torch's, or Transformer Engine's (CUDA)."
    )
    fp8_recipe: Literal["none", "current", "block", "delayed", "mxfp8"] | None = Field(
        None,
        description="FP8 scaling of the blocks' linears (backend te); null: current with te.",
    )
    bf16_layers: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        (), description="Blocks that stay in bf16 beside FP8, by number from 0."
    )
    grad_reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Gradients while they are summed over data-parallel ranks."
    )
    compile: bool = Field(
        False,
        description="Use torch.compile: on whole blocks (backend torch), on what is between their "
        "linears (te).",
    )

    @property
    def recipe(self) -> Literal["current", "block", "delayed", "mxfp8"] | None:
        """The FP8 recipe that is used."""
        if self.backend == "torch" or self.fp8_recipe == "none":
            return None
        return self.fp8_recipe or "current"

    @model_validator(mode="after")
    def _fp8_is_transformer_engines(self) -> Self:
        backend, recipe = self.backend, self.fp8_recipe
        if backend == "torch" and recipe not in (None, "none"):
            raise broken_rule(
                f"precision.fp8_recipe = {recipe} needs precision.backend = te, which is torch: "
                "set it to te, or precision.fp8_recipe to null",
                "precision.fp8_recipe",
                "precision.backend",
            )
        if backend == "te" and self.compute_dtype != "bf16":
            raise broken_rule(
                f"precision.backend = te computes in bf16 and FP8, but precision.compute_dtype = "
                f"{self.compute_dtype}: set it to bf16, or precision.backend to torch",
                "precision.compute_dtype",
                "precision.backend",
            )
        if self.bf16_layers and self.recipe is None:
            raise broken_rule(
                f"precision.bf16_layers = {list(self.bf16_layers)} excepts blocks from FP8, but "
                "there is none: set precision.backend=te and an FP8 recipe, or leave it empty",
                "precision.bf16_layers",
                "precision.fp8_recipe",
            )
        return self


def check_recomputation(precision: PrecisionConfig, mode: str) -> None:
    """Refuse activation checkpointing that Transformer Engine cannot do.

    Args:
        precision: The section.
        mode: ``train.activation_checkpointing``.

    Raises:
        ValueError: Names the settings and what works.
    """
    if precision.backend == "te" and mode == "selective":
        raise broken_rule(
            "train.activation_checkpointing = selective picks among torch's operations and sees "
            "none of Transformer Engine's (precision.backend = te): use none or full",
            "train.activation_checkpointing",
            "precision.backend",
        )
    if precision.recipe == "delayed" and mode == "full":
        raise broken_rule(
            "train.activation_checkpointing = full computes forwards again, which the histories of "
            "precision.fp8_recipe = delayed would count twice: use none, or precision.fp8_recipe = "
            "current or block",
            "train.activation_checkpointing",
            "precision.fp8_recipe",
        )


def check_overlap(config: Config) -> None:
    """Refuse what the buffers of overlapping communication cannot serve: they have one shape.

    Raises:
        ValueError: Names the first setting that does not go with them, and what does.
    """
    parallel, validation = config.parallel, config.validation
    if not parallel.tensor_parallel_overlap:
        return
    tensor, group = (
        parallel.tensor_model_parallel_size,
        getattr(config.objective, "aux_group_size", 1),
    )
    wanted = [
        ("precision.backend", config.precision.backend, config.precision.backend == "te", "te"),
        (
            "precision.fp8_recipe",
            config.precision.recipe,
            config.precision.recipe not in ("block", "mxfp8"),
            "current, delayed or none",
        ),
        ("parallel.tensor_model_parallel_size", tensor, tensor > 1, "2 or more"),
        (
            "parallel.sequence_parallel",
            str(parallel.sequence_parallel).lower(),
            parallel.sequence_parallel,
            "true",
        ),
        (
            "parallel.pipeline_schedule",
            parallel.pipeline_schedule,
            not parallel.pipeline_schedule.startswith("zero_bubble"),
            "one that does not split backwards",
        ),
        ("objective.aux_group_size", group, group == 1, "1"),
        (
            "data.max_aspect_ratio",
            config.data.max_aspect_ratio,
            config.data.max_aspect_ratio == 1,
            "1",
        ),
        (
            "validation.validation_steps",
            validation.validation_steps,
            validation.validation_steps is None,
            "null",
        ),
        ("validation.image_steps", validation.image_steps, validation.image_steps is None, "null"),
    ]
    for key, value, holds, right in wanted:
        if not holds:
            raise broken_rule(
                "parallel.tensor_parallel_overlap keeps Transformer Engine's buffers, of one shape "
                f"for all passes, which {key} = {value} does not go with: set it to {right}, or "
                "parallel.tensor_parallel_overlap to false",
                "parallel.tensor_parallel_overlap",
                key,
            )
