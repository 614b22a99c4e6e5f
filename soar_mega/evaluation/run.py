"""An evaluation: pictures of every model, their scores, results and reports.

Everything in ``results.json`` follows from models, prompts, settings and scorers; what a clock or
the number of processes says is in ``run.json``.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from soar_mega.checkpoint.agree import on_rank_0
from soar_mega.evaluation.gallery import Gallery, Pictures, draw_missing
from soar_mega.evaluation.html_report import html_report
from soar_mega.evaluation.models import LastEncoders, compute_dtype, load_transformer
from soar_mega.evaluation.painter import Painter
from soar_mega.evaluation.plan import Plan, drawn_from
from soar_mega.evaluation.results import CONFIDENCE, RESAMPLES, of_set, summarise
from soar_mega.evaluation.scoring import (
    PictureScores,
    overall_of,
    score_chunks,
    score_set,
    scores_pictures,
    scores_sets,
)
from soar_mega.evaluation.sheet import contact_sheet
from soar_mega.parallel.mesh import Mesh
from soar_mega.telemetry.files import write_whole

RESULTS, SCORES, HTML, SHEET, RUN = (
    "results.json",
    "scores.jsonl",
    "report.html",
    "report.png",
    "run.json",
)
_ON_THE_SHEET = 8  # prompts

# By label, then scorer.
AllScores = dict[str, dict[str, PictureScores]]


def evaluate(
    plan: Plan,
    scorers: Sequence[Any],
    locations: Mapping[str, str | None],
    out: Path,
    mesh: Mesh,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Draw what is missing, score everything, write results and reports; every rank calls it.

    Args:
        plan: Rank 0's is followed: a run may save a checkpoint while others still look.
        scorers: ``Scorer`` or ``SetScorer``, on this rank's device; none: only draw.
        locations: Of each scorer, as given.
        out: Folder to write, on storage that all ranks share.
        mesh: This process.
        tell: Takes lines for a person, on rank 0.

    Returns:
        The content of ``results.json`` on rank 0, None on the others.

    Raises:
        ConfigError: On every rank: ``out`` holds other pictures.
        CheckpointError: On every rank: a model is damaged.
        ScoringError: On every rank: a scorer failed.
        OSError: On the rank that cannot write.
    """
    plan = on_rank_0(mesh, lambda: plan, "the plan")
    tell = tell if mesh.rank == 0 else lambda line: None
    began = time.monotonic()
    facts: dict[str, Any] = {"models": {}, "scorers": {}}
    encoders = LastEncoders(mesh.device, compute_dtype(mesh.device))
    for label in plan.models:
        facts["models"][label] = _draw(plan, label, encoders, out, mesh, tell)
    scores: AllScores = {label: {} for label in plan.models}
    found: dict[str, Any] = {}
    for scorer in scorers:
        started = time.monotonic()
        tell(f"scoring with {scorer.name}")
        found[scorer.name] = {
            "citation": scorer.citation,
            "location": locations.get(scorer.name),
            "overall": overall_of(scorer),
            "models": {
                label: _score(plan, label, scorer, out, mesh, scores) for label in plan.models
            },
        }
        facts["scorers"][scorer.name] = {"seconds": round(time.monotonic() - started, 3)}
    if mesh.rank != 0:
        return None
    results = {**_head(plan, mesh), "scorers": found}
    facts |= {
        "seconds": round(time.monotonic() - began, 3),
        "processes": mesh.world_size,
        "tensor_parallel": mesh.tensor_size,
        "pipeline_parallel": mesh.pipeline_size,
        "device": str(mesh.device),
    }
    _write(plan, out, results, scores, facts)
    return results


def _draw(
    plan: Plan,
    label: str,
    encoders: LastEncoders,
    out: Path,
    mesh: Mesh,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    model, settings, dtype = plan.models[label], plan.settings, compute_dtype(mesh.device)

    def make_painter() -> Painter:
        tell(f"{label}: loading {model.given}")
        return Painter(
            load_transformer(model.source, mesh, dtype),
            encoders.of(model.source),
            model.source.base / "scheduler",
            mesh,
            latent_shape=model.source.latent_shape(model.size, model.size),
            max_sequence_length=model.source.max_sequence_length,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            batch_size=settings.batch,
        )

    drawn = draw_missing(
        plan,
        Gallery(out, label),
        drawn_from(plan, label, _name(dtype)),
        make_painter,
        mesh,
        tell,
    )
    gc.collect()  # the model, before the next one
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return asdict(drawn)


def _score(
    plan: Plan, label: str, scorer: Any, out: Path, mesh: Mesh, scores: AllScores
) -> dict[str, Any]:
    """The scorer's estimates of a model; its pictures' scores go into ``scores``."""
    gallery, chunks = Gallery(out, label), plan.chunks()
    found: dict[str, Any] = {}
    if scores_pictures(scorer):
        # Whoever drew them: a picture is read as it was written.
        own = score_chunks(
            scorer,
            chunks,
            plan.prompts,
            gallery.open,
            lambda number: number % mesh.world_size == mesh.rank,
            mesh,
        )
        scores[label][scorer.name] = own
        if mesh.rank == 0:
            categories = [prompt.category for prompt in plan.prompts]
            found |= summarise(own, categories, overall=overall_of(scorer))
    if scores_sets(scorer):
        order = sorted(picture for chunk in chunks for picture in chunk.pictures)
        prompts = [plan.prompts[number] for number, _ in order]
        metrics = score_set(scorer, Pictures(gallery, order), prompts, mesh)
        found |= of_set(metrics, len(plan.prompts), len(order))
    return found


def _head(plan: Plan, mesh: Mesh) -> dict[str, Any]:
    settings = plan.settings
    return {
        "format": 1,
        "prompts": {
            "file": str(settings.prompts),
            "format": settings.format,
            "hash": plan.prompts_hash,
            "count": len(plan.prompts),
        },
        "settings": {
            "repeats": settings.repeats,
            "seed": settings.seed,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "batch": settings.batch,
            "dtype": _name(compute_dtype(mesh.device)),
        },
        "intervals": {
            "confidence": CONFIDENCE,
            "method": "percentile bootstrap over prompts",
            "resamples": RESAMPLES,
        },
        "models": {
            label: {
                "given": model.given,
                **model.source.identity,
                "size": model.size,
                "max_sequence_length": model.source.max_sequence_length,
            }
            for label, model in plan.models.items()
        },
    }


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _write(
    plan: Plan,
    out: Path,
    results: Mapping[str, Any],
    scores: AllScores,
    facts: Mapping[str, Any],
) -> None:
    galleries = {label: Gallery(out, label) for label in plan.models}

    def scores_of(label: str, picture: tuple[int, int]) -> dict[str, float]:
        return {
            f"{name}/{metric}": value
            for name, found in scores[label].items()
            for metric, value in found[picture].items()
        }

    def open_picture(label: str, picture: tuple[int, int]) -> Image.Image:
        return galleries[label].open(picture)

    order = sorted(picture for chunk in plan.chunks() for picture in chunk.pictures)
    lines = [
        {
            "model": label,
            "prompt": picture[0],
            "repeat": picture[1],
            "text": plan.prompts[picture[0]].text,
            "category": plan.prompts[picture[0]].category,
            "file": galleries[label].relative(picture),
            "scores": {name: dict(found[picture]) for name, found in scores[label].items()},
        }
        for label in plan.models
        for picture in order
    ]
    write_whole(out / SCORES, "".join(json.dumps(line) + "\n" for line in lines))
    page = html_report(
        results,
        plan.prompts,
        plan.settings.repeats,
        lambda label, picture: galleries[label].relative(picture),
        scores_of,
    )
    write_whole(out / HTML, page)
    shown = plan.prompts[:_ON_THE_SHEET]
    contact_sheet(shown, list(plan.models), open_picture, scores_of).save(out / SHEET)
    write_whole(out / RUN, json.dumps(facts, indent=1) + "\n")
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write_whole(out / RESULTS, text)  # last: what is there is whole
