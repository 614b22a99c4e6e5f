"""Pictures drawn while training, through the run's own pipeline."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from PIL import Image

from soar_mega.evaluation.painter import Painter
from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.setup import Run


def painter_of(run: Run, batch_size: int) -> Painter:
    """Draws with whatever weights the model has; settings are those of ``validation``."""
    assert run.encoders is not None
    config = run.config
    return Painter(
        run.stepper.pipeline.forward_everywhere,
        run.encoders,
        run.checked.folder / "scheduler",
        run.mesh,
        latent_shape=run.facts.latent_shape(config.data.resolution),
        max_sequence_length=config.data.max_sequence_length,
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        batch_size=batch_size,
    )


def gather_pictures(pictures: Mapping[int, Image.Image], mesh: Mesh) -> dict[int, Image.Image]:
    """The pictures of all data-parallel ranks by number, on rank 0; every rank calls it."""
    parts = [dict(pictures)]
    if mesh.data_group is not None:
        parts = [{} for _ in range(mesh.data_size)]
        with waiting_for("data-parallel peers, to gather pictures"):
            dist.all_gather_object(parts, dict(pictures), group=mesh.data_group)
    everything = {number: picture for part in parts for number, picture in part.items()}
    return {number: everything[number] for number in sorted(everything)}
