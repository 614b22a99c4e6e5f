"""Scores of pictures that a run's averaged weights draw, every so many steps.

Prompts are drawn in batches of ``train.micro_batch_size`` whose composition no layout changes; the
data-parallel ranks share them, and each judges what it drew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from PIL import Image

from soar_mega.evaluation.painter import Batch
from soar_mega.evaluation.plan import cut
from soar_mega.evaluation.results import of_set, summarise
from soar_mega.evaluation.scoring import (
    overall_of,
    score_chunks,
    score_set,
    scores_pictures,
    scores_sets,
)
from soar_mega.training.pictures import gather_pictures, painter_of
from soar_mega.training.setup import Run


class Evaluation:
    """The evaluations of a run; every rank makes one and calls it at the same steps."""

    def __init__(self, run: Run) -> None:
        self._run, self._settings = run, run.config.validation
        self._prompts, self._scorers = run.checked.evaluated, run.checked.scorers

    def is_due(self, step: int) -> bool:
        """Whether pictures are scored after ``step`` steps."""
        every, last = self._settings.evaluate_steps, self._run.config.train.max_train_steps
        return every is not None and (step % every == 0 or step == last)

    def measure(
        self,
        alive: Callable[[], None] = lambda: None,
        leaves: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """``eval/<scorer>/<metric>``, and ``eval/<scorer>/<metric>/<category>`` of each category.

        Args:
            alive: Called after each round of drawing, and before each picture is judged.
            leaves: Called before each round, by all ranks at once: whether to break off.

        Returns:
            The metrics, the same on every rank, NaN where a set has none; empty where it was
            broken off.

        Raises:
            ScoringError: On every rank, if a scorer failed on any.
        """
        pictures = self._draw(alive, leaves)
        if pictures is None:
            return {}
        metrics: dict[str, float] = {}
        for scorer in self._scorers:
            for metric, found in self._score(scorer, pictures, alive).items():
                name = f"eval/{scorer.name}/{metric}"
                value = found["overall"]["value"]
                metrics[name] = math.nan if value is None else value
                for category, estimate in found["categories"].items():
                    metrics[f"{name}/{category}"] = estimate["value"]
        return metrics

    def _draw(
        self, alive: Callable[[], None], leaves: Callable[[], bool]
    ) -> dict[int, Image.Image] | None:
        """The pictures that this rank has, by prompt; None: broken off."""
        run, mesh = self._run, self._run.mesh
        size = run.config.train.micro_batch_size
        chunks, painter = cut(len(self._prompts), 1, size), painter_of(run, size)
        own = chunks[mesh.data_rank :: mesh.data_size]
        rounds = -(-len(chunks) // (mesh.data_size * mesh.pipeline_size))
        pictures: dict[int, Image.Image] = {}
        with run.stepper.parameters.borrow(run.stepper.ema.shard):
            for number in range(rounds):
                if leaves():
                    return None
                part = own[number * mesh.pipeline_size :][: mesh.pipeline_size]
                batches = [
                    Batch([self._prompts[n].text for n in chunk.prompts], chunk.prompts)
                    for chunk in part
                ]
                for chunk, drawn in zip(part, painter.draw(batches), strict=True):
                    pictures.update(zip(chunk.prompts, drawn, strict=bool(drawn)))
                alive()
        return pictures

    def _score(
        self, scorer: Any, pictures: dict[int, Image.Image], alive: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        mesh, prompts = self._run.mesh, self._prompts
        found: dict[str, dict[str, Any]] = {}

        def open_picture(picture: tuple[int, int]) -> Image.Image:
            alive()
            return pictures[picture[0]]

        if scores_pictures(scorer):
            scores = score_chunks(
                scorer,
                cut(len(prompts), 1, self._run.config.train.micro_batch_size),
                prompts,
                open_picture,
                lambda n: n % mesh.data_size == mesh.data_rank and mesh.model_rank == 0,
                mesh,
            )
            found |= summarise(
                scores,
                [prompt.category for prompt in prompts],
                overall=overall_of(scorer),
            )
        if scores_sets(scorer):
            everything = list(gather_pictures(pictures, mesh).values())
            found |= of_set(
                score_set(scorer, everything, prompts, mesh), len(prompts), len(prompts)
            )
        return found
