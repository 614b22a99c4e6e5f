"""Around the step with stages: validation, pictures, EMA, checkpoints, resume, timelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soar_mega.pipeline.schedules import build_schedule
from soar_mega.pipeline.simulator import Costs, simulate
from soar_mega.pipeline.timeline import Timeline
from tests.distributed.harness import run_ranks
from tests.runs import (
    SIZES,
    Tiny,
    assert_same_state,
    assert_weights,
    checkpoint,
    copy_checkpoint,
    losses,
    make_small_tiny,
    metrics,
    start,
    state,
    train,
)

LAYERS, STEPS, HALF = 4, 4, 2
COMMON = (
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    f"train.max_train_steps={STEPS}",
    f"checkpoint.checkpointing_steps={HALF}",
    f"validation.validation_steps={HALF}",
    "validation.num_samples=6",
    "validation.num_timesteps=3",
    f"validation.image_steps={STEPS}",
    "validation.num_inference_steps=3",
)


def layout(pipeline: int, schedule: str, tensor: int = 1, *more: str) -> tuple[str, ...]:
    return (
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"parallel.pipeline_schedule={schedule}",
        f"parallel.tensor_model_parallel_size={tensor}",
        *more,
    )


ONLY_PIPELINE = layout(4, "zero_bubble", 1, f"logging.timeline_step={HALF}")
FOLDED = layout(2, "zero_bubble_v", 2)
INTERLEAVED = layout(2, "interleaved_1f1b", 1, "parallel.pipeline_layout=[1,1,1,1]")


def work_on_four(tiny: Tiny, folder: Path) -> None:
    shards = f"validation.shards={tiny.shards('heldout')}"
    for name, how in (("pipeline", ONLY_PIPELINE), ("folded", FOLDED)):
        train(tiny.config("soar", folder / name, *COMMON, shards, *how))
    if torch.distributed.get_rank() == 0:
        for name in ("resumed", "saved"):
            copy_checkpoint(checkpoint(folder / "folded", HALF), folder / name)
    torch.distributed.barrier()
    # Folded with tensor parallel 2, taken up interleaved with data parallel 2.
    resume = ("checkpoint.resume=latest", shards, *INTERLEAVED)
    run = start(tiny.config("soar", folder / "saved", *COMMON, *resume))
    assert run.done_steps == HALF
    assert_weights(run, state(checkpoint(folder / "folded", HALF)), "model")
    run.saver.save(STEPS)
    run.saver.finish()
    run.feed.close()
    # Fewer validation samples than data-parallel ranks, one of which has nothing to do.
    few = "validation.num_samples=1"
    train(tiny.config("soar", folder / "resumed", *COMMON, *resume, few))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process (``alone``) and of four."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = make_small_tiny(folder / "tiny", replace(SIZES, num_layers=LAYERS))
    shards = f"validation.shards={tiny.shards('heldout')}"
    train(tiny.config("soar", folder / "alone", *COMMON, shards))
    run_ranks(4, work_on_four, tiny, folder)
    return folder


def test_metrics_equal_one_process(folder: Path) -> None:
    """Training and validation losses, clipped steps, EMA weights behind the validation."""
    alone = metrics(folder / "alone")
    assert "val/loss" in alone[HALF - 1]
    for name, tolerance in (("pipeline", 1e-6), ("folded", 1e-5)):
        for found, wanted in zip(metrics(folder / name), alone, strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert found[key] == pytest.approx(value, rel=tolerance), (name, key)


def test_pictures_go_through_the_pipeline(folder: Path) -> None:
    """Weights differ in their last bits after some steps, pictures by as little."""
    from PIL import Image, ImageChops

    name = f"samples/step_{STEPS:08d}/grid.png"
    wanted = Image.open(folder / "alone" / name)
    assert len(wanted.getcolors(1 << 16) or [0] * 99) > 16, "a picture of something"
    for run in ("pipeline", "folded"):
        found = Image.open(folder / run / name)
        low_high = ImageChops.difference(found, wanted).getextrema()
        assert max(high for _, high in low_high) <= 2, run


def test_any_layout_loads_any_other(folder: Path) -> None:
    """Weights, EMA and optimizer saved by one layout and saved again by another are the same."""
    assert_same_state(checkpoint(folder / "folded", HALF), checkpoint(folder / "saved", STEPS))


def test_resumed_in_another_layout_equals_unbroken(folder: Path) -> None:
    found, wanted = losses(folder / "resumed"), losses(folder / "alone")[HALF:]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert 0 < metrics(folder / "resumed")[-1]["val/loss"] < 10


def test_timeline_of_a_real_step(folder: Path) -> None:
    where = folder / "pipeline" / "timeline"
    line = Timeline.load(where / f"step_{HALF:08d}.json")
    schedule = build_schedule("zero_bubble", line.step.passes, ranks=4, microbatches=2)
    planned = tuple(tuple(actions) for actions in schedule.actions)
    assert tuple(tuple(event.action for event in rank) for rank in line.events) == planned
    assert line.unit == "s" and 0 < line.makespan < 600
    for rank in line.events:
        assert all(event.start <= event.end for event in rank)
    # No action begins before the message it needs is made.
    made = {
        line.step.makes(rank, event.action): event.end
        for rank in line.ranks
        for event in line.compute(rank)
    }
    needed = [
        (made[need], event)
        for rank in line.ranks
        for event in line.compute(rank)
        if (need := line.step.needs(rank, event.action)) in made and need is not None
    ]
    assert len(needed) > 20 and all(end <= event.end for end, event in needed)
    # With its own costs the simulator needs no longer: messages and waits cost it nothing.
    assert simulate(schedule, Costs.of([line])).makespan < 1.5 * line.makespan
    assert (where / f"step_{HALF:08d}.svg").read_text().startswith("<svg")
    assert json.loads((where / f"step_{HALF:08d}.trace.json").read_text())["traceEvents"]
    assert not (folder / "folded" / "timeline").exists()
