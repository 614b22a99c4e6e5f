"""Validation: loss at fixed timesteps with fixed noise, and pictures of fixed prompts and seeds.

Both use the averaged (EMA) weights and the pipeline. The loss is a table over (timestep, sample)
that the data-parallel ranks fill in together and every rank sums in one order, in fp64.

Legend: S samples, K timesteps, B samples of a batch, C/H/W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.data.shards.index import ShardIndex
from soar_mega.data.validation import encoded_validation, load_validation
from soar_mega.evaluation.painter import Batch
from soar_mega.evaluation.plan import cut
from soar_mega.objectives.sigmas import shift_sigma
from soar_mega.passes import ModelInput, TextCondition
from soar_mega.rng import Purpose, normal
from soar_mega.sampling.pictures import grid
from soar_mega.training.feed import DTYPES
from soar_mega.training.pictures import gather_pictures, painter_of
from soar_mega.training.report import fill_together
from soar_mega.training.setup import Run


class Validation:
    """Held-out samples, encoded once, and the picture grid."""

    def __init__(self, run: Run) -> None:
        self._run, config = run, run.config
        self.settings = config.validation
        self._latents_SCHW: Tensor | None = None
        if run.checked.validation_index is not None:
            self._latents_SCHW, self._captions = self._load(run.checked.validation_index)

    def _load(self, index: ShardIndex) -> tuple[Tensor, TextCondition]:
        config, count, encoders = self._run.config, self.settings.num_samples, self._run.encoders
        encoded = self._run.checked.validation_set
        if encoded is not None:
            dtype, device = DTYPES[config.precision.compute_dtype], self._run.mesh.device
            return encoded_validation(encoded, self._run.facts, count, dtype=dtype, device=device)
        assert encoders is not None
        return load_validation(
            index,
            encoders,
            count,
            resolution=config.data.resolution,
            max_sequence_length=config.data.max_sequence_length,
        )

    def is_due(self, step: int) -> bool:
        """Whether losses are measured after ``step`` steps."""
        every = self.settings.validation_steps
        last = self._run.config.train.max_train_steps
        return every is not None and (step % every == 0 or step == last)

    def pictures_due(self, step: int) -> bool:
        """Whether pictures are drawn after ``step`` steps."""
        every = self.settings.image_steps
        last = self._run.config.train.max_train_steps
        return every is not None and (step % every == 0 or step == last)

    @torch.no_grad()
    def losses(self, alive: Callable[[], None] = lambda: None) -> dict[str, float]:
        """``val/loss`` and ``val/loss_t_<permille>``: mean squared error over all samples.

        Args:
            alive: Called after each microbatch.
        """
        run, mesh = self._run, self._run.mesh
        assert self._latents_SCHW is not None
        S, K = len(self._latents_SCHW), self.settings.num_timesteps
        shift = run.config.objective.shift or run.facts.shift
        t_K = (torch.arange(K, dtype=torch.float64) + 0.5) / K
        sigma_K = shift_sigma(t_K, shift)
        table_KS = torch.zeros(K, S, dtype=torch.float64, device=mesh.device)
        own = torch.arange(S)[mesh.data_rank :: mesh.data_size]
        pipeline = run.stepper.pipeline
        with run.stepper.parameters.borrow(run.stepper.ema.shard):
            for samples_B in own.split(run.config.train.micro_batch_size):
                if not len(samples_B):  # fewer samples than data-parallel ranks
                    continue
                cases = [self._case(samples_B, float(sigma_K[k]), k) for k in range(K)]
                velocities = pipeline.forward([x for x, _ in cases])
                for k, velocity_BCHW in enumerate(velocities):
                    error_BCHW = velocity_BCHW.float() - cases[k][1]
                    table_KS[k, samples_B.to(mesh.device)] = (
                        error_BCHW.square().mean(dim=(1, 2, 3)).double()
                    )
                alive()
        table_KS = fill_together(table_KS, mesh, owns_last=pipeline.owns_last)
        by_time = table_KS.mean(dim=1).tolist()
        metrics = {"val/loss": sum(by_time) / K}
        for t, value in zip(t_K.tolist(), by_time, strict=True):
            metrics[f"val/loss_t_{round(1000 * t):04d}"] = value
        return metrics

    def _case(self, samples_B: Tensor, sigma: float, k: int) -> tuple[ModelInput, Tensor]:
        """The noisy input of some samples, and the velocity that would be right."""
        run = self._run
        assert self._latents_SCHW is not None
        device = run.mesh.device
        rows = samples_B.to(device)
        clean_BCHW = self._latents_SCHW[rows]
        noise_BCHW = normal(
            run.config.run.seed,
            Purpose.VALIDATION,
            0,
            samples_B,
            clean_BCHW[0].numel(),
            index=k,
            device=device,
        ).view_as(clean_BCHW)
        condition = TextCondition(self._captions.text_BTE[rows], self._captions.pooled_BV[rows])
        state_BCHW = (1 - sigma) * clean_BCHW + sigma * noise_BCHW
        timestep_B = torch.full((len(rows),), 1000 * sigma, device=device)
        return ModelInput(state_BCHW, timestep_B, condition), noise_BCHW - clean_BCHW

    def pictures(self, step: int) -> Path | None:
        """Draw the prompts; rank 0 writes ``samples/step_<step>/grid.png`` and returns its path."""
        run, mesh, prompts = self._run, self._run.mesh, self.settings.prompts
        # A share for each rank, as far as they go.
        share = -(-len(prompts) // mesh.data_size)
        size = min(run.config.train.micro_batch_size, share)
        own = cut(len(prompts), 1, size)[mesh.data_rank :: mesh.data_size]
        batches = [Batch([prompts[n] for n in chunk.prompts], chunk.prompts) for chunk in own]
        with run.stepper.parameters.borrow(run.stepper.ema.shard):
            drawn = painter_of(run, size).draw(batches)
        pictures = {
            number: picture
            for chunk, images in zip(own, drawn, strict=True)
            for number, picture in zip(chunk.prompts, images, strict=bool(images))
        }
        everything = gather_pictures(pictures, mesh)
        if mesh.rank != 0:
            return None
        path = Path(run.config.run.dir) / "samples" / f"step_{step:08d}" / "grid.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(list(everything.values())).save(path)
        return path
