"""Drawing pictures in calls of a fixed size: the one way from prompts to pictures.

A matrix product's bits may depend on how many rows it has, so a picture's bits may depend on the
batch it was drawn in. Here a batch is always filled up to one size, and who draws it does not
matter.

Legend: B pictures of a batch, C/H/W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from soar_mega.data.encoders import FrozenEncoders
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import TextCondition
from soar_mega.sampling.generate import ModelFunction, generate, start_noise
from soar_mega.sampling.pictures import to_pictures


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together.

    Attributes:
        prompts: Of each.
        seeds: Of each.
        repeat: See ``start_noise``.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    repeat: int = 0


@dataclass(frozen=True)
class Painter:
    """A model, its encoders, and how they are sampled.

    Attributes:
        velocities: The model; every rank that holds a part of it draws the same batches.
        encoders: Text encoders and VAE.
        scheduler: Folder with ``scheduler_config.json``.
        mesh: Where this process stands.
        latent_shape: (C, H, W).
        max_sequence_length: T5's tokens.
        num_inference_steps, guidance_scale: See ``generate``.
        batch_size: Pictures of one pass through the model.
    """

    velocities: ModelFunction
    encoders: FrozenEncoders
    scheduler: Path
    mesh: Mesh
    latent_shape: tuple[int, int, int]
    max_sequence_length: int
    num_inference_steps: int
    guidance_scale: float
    batch_size: int

    @torch.no_grad()
    def draw(self, batches: Sequence[Batch]) -> list[list[Image.Image]]:
        """Draw some batches at once; more than one keep the stages of a pipeline busy.

        Args:
            batches: Of at most ``batch_size`` pictures each; the same on the ranks of one model.

        Returns:
            The pictures of each batch on the first rank of the model; empty lists on its others.

        Raises:
            ValueError: A seed is out of range.
        """
        size = self.batch_size
        assert all(0 < len(batch.prompts) <= size for batch in batches)
        if not batches:
            return []
        full = [_filled(batch, size) for batch in batches]
        latents_BCHW = generate(
            self.velocities,
            self._conditions(full),
            self.encoders.encode_prompts([""], self.max_sequence_length),
            self.scheduler,
            latents_BCHW=torch.cat(
                [start_noise(b.seeds, self.latent_shape, self.mesh.device, b.repeat) for b in full]
            ),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            batch_size=size,
        )
        if self.mesh.model_rank != 0:
            return [[] for _ in batches]
        drawn = [to_pictures(self.encoders.decode(part)) for part in latents_BCHW.split(size)]
        return [p[: len(b.prompts)] for p, b in zip(drawn, batches, strict=True)]

    def _conditions(self, batches: Sequence[Batch]) -> TextCondition:
        """Encoded batch by batch, for the same reason."""
        length = self.max_sequence_length
        found = [self.encoders.encode_prompts(b.prompts, length) for b in batches]
        return TextCondition(
            torch.cat([c.text_BTE for c in found]), torch.cat([c.pooled_BV for c in found])
        )


def _filled(batch: Batch, size: int) -> Batch:
    missing = size - len(batch.prompts)
    return Batch(
        [*batch.prompts, *[batch.prompts[-1]] * missing],
        [*batch.seeds, *[batch.seeds[-1]] * missing],
        batch.repeat,
    )
