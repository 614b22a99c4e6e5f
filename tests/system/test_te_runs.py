"""Whole runs on a stand-in for Transformer Engine: resume, changes of recipe, export."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from soar_mega.checkpoint.exporter import export
from soar_mega.checkpoint.store import StateReader
from tests import te_stand_in
from tests.runs import Tiny, assert_same_state, checkpoint, metrics, train

FP8 = ("fp8_recipe=delayed", "backend=te", "compute_dtype=bf16")


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> te_stand_in.World:
    return te_stand_in.install(monkeypatch)


def run(tiny: Tiny, folder: Path, steps: int, *precision: str, resume: str = "latest") -> None:
    train(
        tiny.config(
            "soar",
            folder,
            "run.name=run",
            f"train.max_train_steps={steps}",
            "train.micro_batch_size=4",
            "checkpoint.checkpointing_steps=2",
            "logging.fp8_statistics_steps=2",
            f"checkpoint.resume={resume}",
            *(f"precision.{setting}" for setting in precision),
        )
    )


def test_delayed_scaling_goes_on_where_it_was(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tiny, whole, 4, *FP8)
    run(tiny, broken, 2, *FP8)
    te_stand_in.install(monkeypatch)
    run(tiny, broken, 4, *FP8)
    assert_same_state(checkpoint(whole, 4), checkpoint(broken, 4))
    stored = StateReader(checkpoint(whole, 4))
    scales = [name for name in stored.shapes if name.startswith("fp8.")]
    assert "fp8.blocks.0.image_mlp.up" in scales
    assert all(stored.read(name).any() for name in scales)
    one, other = metrics(whole), metrics(broken)
    assert one == other
    assert [("fp8/input_amax" in line, "fp8/gradient_fill" in line) for line in one] == [
        (False, False),
        (True, True),
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize(
    ("before", "after", "notes"),
    [
        (
            ("compute_dtype=bf16",),
            FP8,
            [
                "precision.backend was torch and is now te",
                "precision.fp8_recipe was none and is now delayed",
                "no such scales as precision.fp8_recipe = delayed",
            ],
        ),
        (
            FP8,
            ("compute_dtype=bf16", "backend=te"),
            ["precision.fp8_recipe was delayed and is now current"],
        ),
        (
            FP8,
            ("compute_dtype=bf16",),
            [
                "precision.backend was te and is now torch",
                "precision.fp8_recipe was delayed and is now none",
            ],
        ),
    ],
)
def test_number_formats_may_change_with_a_notice(
    before: tuple[str, ...],
    after: tuple[str, ...],
    notes: list[str],
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(tiny, tmp_path, 2, *before)
    assert "is now" not in capsys.readouterr().out
    te_stand_in.install(monkeypatch)
    run(tiny, tmp_path, 4, *after)
    said = capsys.readouterr().out
    for note in notes:
        assert note in said
    assert said.count("is now") + said.count("no such scales") == len(notes)
    losses = [line["train/loss"] for line in metrics(tmp_path)]
    assert losses[2] == pytest.approx(losses[1], rel=0.3)


def test_exports_hold_no_scales(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run", 2, *FP8)
    out = export(tmp_path / "run", tmp_path / "out", transformer_only=True)
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:  # type: ignore[no-untyped-call]
        assert not [key for key in file.keys() if "fp8" in key or "extra_state" in key]  # noqa: SIM118
