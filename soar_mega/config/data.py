"""Keys of the training data."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from soar_mega.config.section import Section, Text, Texts, broken_rule

# Latents are 8 times smaller than pictures and enter the model in 2x2 patches.
RESOLUTION_STEP = 16


class SourceConfig(Section):
    """One of several sources of training data."""

    name: Text = Field(description="Name in messages and metrics.")
    shards: Text | Texts = Field(description="As data.shards.")
    weight: float = Field(
        1.0, gt=0, description="Share of the samples, relative to the other sources' weights."
    )


class DataConfig(Section):
    """The training data: WebDataset tar shards."""

    shards: Text | Texts | None = Field(
        None, description="Path, glob, URL or list of those, of tar shards; braces expand."
    )
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = Field(
        (), description="Instead of shards: several sources (name, shards, weight), mixed."
    )
    resolution: int = Field(
        64,
        ge=RESOLUTION_STEP,
        multiple_of=RESOLUTION_STEP,
        description="Side of the square training pictures in pixels.",
    )
    max_aspect_ratio: float = Field(
        1.0,
        ge=1,
        le=4,
        description="Longest side over the shortest of training pictures; above 1, pictures are "
        "brought to the nearest of several sizes of about resolution x resolution pixels.",
    )
    bucket_group_size: int | None = Field(
        None,
        ge=1,
        description="Consecutive samples of one size; null: train.micro_batch_size.",
    )
    random_crop: bool = Field(False, description="Cut at a random place instead of the middle.")
    random_flip: bool = Field(False, description="Mirror half of the pictures.")
    max_sequence_length: int = Field(77, ge=1, le=512, description="T5 tokens per prompt.")
    cache_encoded: bool = Field(
        False, description="Keep every encoded sample in host memory; for small data sets."
    )
    shuffle_shards: int | None = Field(
        None, ge=1, description="Shards whose samples are mixed in an epoch; null: all of a source."
    )
    decoder: Literal["pil", "dali"] = Field("pil", description="What decodes pictures.")
    num_workers: int = Field(
        2, ge=0, description="Threads of a process that read and decode ahead; 0: none."
    )
    prefetch_steps: int = Field(2, ge=1, description="Steps read and decoded ahead.")
    max_bad_rate: float = Field(
        0.01,
        ge=0,
        le=1,
        description="The run stops when more of its samples (and of 1000) could not be used.",
    )
    cache_dir: Text | None = Field(
        None, description="Folder of this machine for shards behind URLs; null: none allowed."
    )
    cache_gb: float = Field(100.0, gt=0, description="Most that cache_dir may hold, in 10^9 bytes.")
    allow_pipe: bool = Field(
        False, description="Run the commands of pipe: shards; only for settings you trust."
    )

    @model_validator(mode="after")
    def _names_its_shards_once(self) -> Self:
        if (self.shards is None) == (not self.sources):
            state = "both are" if self.sources else "neither is"
            raise broken_rule(
                f"data.shards and data.sources: {state} set; set one of them",
                "data.shards",
                "data.sources",
            )
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise broken_rule(
                f"data.sources has the names {', '.join(names)}: each must be there once",
                "data.sources",
            )
        return self

    @model_validator(mode="after")
    def _cached_samples_stay_as_they_are(self) -> Self:
        for name in ("random_flip", "random_crop"):
            if self.cache_encoded and getattr(self, name):
                raise broken_rule(
                    f"data.{name} = true cannot go with data.cache_encoded = true: a cached latent "
                    "is encoded once and never changed again; set one of them to false",
                    f"data.{name}",
                    "data.cache_encoded",
                )
        return self
