"""Validation: the same numbers in every layout, of the averaged weights, no trace in training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from soar_mega.training.validation import Validation
from tests.distributed.harness import run_ranks
from tests.runs import (
    Tiny,
    assert_same_state,
    checkpoint,
    command,
    copy_checkpoint,
    metrics,
    start,
    train,
)

STEPS, SAMPLES, TIMESTEPS = 4, 5, 4
# Tensor parallel size, sequence parallel, microbatch. Five samples are 3 and 2 on two data ranks
# and 2, 1, 1, 1 on four.
Layout = tuple[int, bool, int]
LAYOUTS: dict[int, list[Layout]] = {
    1: [(1, False, 1), (1, False, 5)],
    2: [(1, False, 2), (2, True, 2)],
    4: [(1, False, 2), (2, True, 1), (4, False, 2)],
}


def losses_only(tiny: Tiny) -> list[str]:
    return [
        "validation.validation_steps=2",
        f"validation.shards={tiny.shards('heldout')}",
        f"validation.num_samples={SAMPLES}",
        f"validation.num_timesteps={TIMESTEPS}",
    ]


def everything(tiny: Tiny) -> list[str]:
    """Losses and the two pictures of the tiny configs."""
    return [
        *losses_only(tiny),
        "validation.image_steps=2",
        "validation.num_inference_steps=3",
    ]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation; its averaged weights differ from the plain ones."""
    folder = tmp_path_factory.mktemp("trained")
    more = f"train.max_train_steps={STEPS}"
    assert command(tiny.arguments("soar", folder, more, *everything(tiny))) == 0
    return folder


def validation_metrics(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith("val/")}


def picture(run_dir: Path, step: int) -> np.ndarray:
    path = run_dir / "samples" / f"step_{step:08d}" / "grid.png"
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def layout_name(layout: Layout) -> str:
    tensor, sequence, micro = layout
    return f"tensor{tensor}-sequence{int(sequence)}-micro{micro}"


def validate(
    tiny: Tiny, folder: Path, source: Path, layouts: list[Layout]
) -> list[dict[str, float]]:
    """Losses and pictures of a new run that starts with averaged weights, in several layouts."""
    found = []
    for layout in layouts:
        tensor, sequence, micro = layout
        run = start(
            tiny.config(
                "soar",
                folder / layout_name(layout),
                f"model.init_from={source}",
                "model.init_from_weights=ema",
                f"parallel.tensor_model_parallel_size={tensor}",
                f"parallel.sequence_parallel={str(sequence).lower()}",
                f"train.micro_batch_size={micro}",
                f"train.global_batch_size={8 if micro < 5 else 10}",
                *everything(tiny),
            )
        )
        validation = Validation(run)
        found.append(validation.losses())
        assert (validation.pictures(STEPS) is None) == (run.mesh.rank > 0)
        run.feed.close()
    return found


def train_in_two_data_ranks(tiny: Tiny, folder: Path) -> None:
    for name, more in (("with", everything(tiny)), ("without", [])):
        train(tiny.config("soar", folder / name, f"train.max_train_steps={STEPS}", *more))


def on_two(tiny: Tiny, folder: Path, source: Path) -> list[dict[str, float]]:
    train_in_two_data_ranks(tiny, folder)
    return validate(tiny, folder, source, LAYOUTS[2])


def assert_near(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=0), name


def assert_layouts(
    ranks: list[list[dict[str, float]]], layouts: list[Layout], folder: Path, trained: Path
) -> None:
    expected = validation_metrics(metrics(trained)[-1])
    for number, layout in enumerate(layouts):
        for rank in ranks:
            assert_near(rank[number], expected)
            assert rank[number] == ranks[0][number]
        drawn = picture(folder / layout_name(layout), STEPS)
        assert np.abs(drawn - picture(trained, STEPS)).max() <= 1


def assert_no_trace(with_validation: Path, without: Path) -> None:
    """The same bits, whatever was measured on the way."""
    lines = metrics(with_validation)
    assert [bool(validation_metrics(line)) for line in lines] == [False, True] * 2
    rest = [{k: v for k, v in line.items() if not k.startswith("val/")} for line in lines]
    assert rest == metrics(without)
    assert_same_state(checkpoint(with_validation, STEPS), checkpoint(without, STEPS))


def test_names_and_mean(trained: Path) -> None:
    found = validation_metrics(metrics(trained)[-1])
    by_time = [found.pop(f"val/loss_t_{t:04d}") for t in (125, 375, 625, 875)]
    assert found.keys() == {"val/loss"}
    assert found["val/loss"] == pytest.approx(sum(by_time) / TIMESTEPS, rel=1e-12)
    assert len(set(by_time)) == TIMESTEPS


def test_single_process(tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    """Microbatches of 1 and 5 samples weigh every sample the same."""
    ranks = run_ranks(1, validate, tiny, tmp_path, trained, LAYOUTS[1])
    assert_layouts(ranks, LAYOUTS[1], tmp_path, trained)


def test_two_processes(tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    ranks = run_ranks(2, on_two, tiny, tmp_path, trained)
    assert_layouts(ranks, LAYOUTS[2], tmp_path, trained)
    # Two data ranks while plain and averaged weights differ.
    assert_no_trace(tmp_path / "with", tmp_path / "without")
    for line, expected in zip(metrics(tmp_path / "with"), metrics(trained), strict=True):
        assert_near(validation_metrics(line), validation_metrics(expected))


@pytest.mark.full
def test_four_processes(tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    ranks = run_ranks(4, validate, tiny, tmp_path, trained, LAYOUTS[4])
    assert_layouts(ranks, LAYOUTS[4], tmp_path, trained)


def test_averaged_weights_are_measured(tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    """Not the plain ones, which are others and give another loss."""
    found = {}
    for weights in ("ema", "plain"):
        run = start(
            tiny.config(
                "soar",
                tmp_path / weights,
                f"model.init_from={trained}",
                f"model.init_from_weights={weights}",
                *losses_only(tiny),
            )
        )
        found[weights] = Validation(run).losses()
        run.feed.close()
    assert found["ema"] == validation_metrics(metrics(trained)[-1])
    assert found["plain"] != found["ema"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_is_untouched(dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    more = [f"precision.compute_dtype={dtype}", f"train.max_train_steps={STEPS}"]
    for name, validation in (("with", everything(tiny)), ("without", [])):
        assert command(tiny.arguments("sft", tmp_path / name, *more, *validation)) == 0
    assert_no_trace(tmp_path / "with", tmp_path / "without")


def test_picture_grid(trained: Path) -> None:
    """The two prompts of the tiny configs side by side, at every second step and nowhere else."""
    folders = sorted(path.name for path in (trained / "samples").iterdir())
    assert folders == ["step_00000002", "step_00000004"]
    early, late = picture(trained, 2), picture(trained, 4)
    assert early.shape == late.shape == (64, 2 * 64 + 2, 3)
    left, right = late[:, :64], late[:, 66:]
    assert left.std() > 1 and np.abs(left - right).mean() > 1
    assert (late[:, 64:66] == 255).all()


def test_last_step_is_validated(tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    """Also where the interval does not divide the number of steps; and after a resume."""
    copy_checkpoint(checkpoint(trained, STEPS), tmp_path)
    more = ("checkpoint.resume=latest", f"train.max_train_steps={STEPS + 1}")
    assert command(tiny.arguments("soar", tmp_path, *losses_only(tiny), *more)) == 0
    (line,) = metrics(tmp_path)
    assert line["step"] == STEPS + 1 and "val/loss" in line


def test_wandb_offline(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is tracked without a network, and trains as it does without the tracker."""
    pytest.importorskip("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = [*everything(tiny), "train.max_train_steps=2"]
    offline = ["logging.wandb_project=tests", "logging.wandb_mode=offline"]
    assert command(tiny.arguments("sft", tmp_path / "tracked", *more, *offline)) == 0
    assert command(tiny.arguments("sft", tmp_path / "plain", *more)) == 0
    (run_id,) = (tmp_path / "tracked" / "wandb_run_id.txt").read_text().split()
    (folder,) = (tmp_path / "tracked" / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    assert run_id in log.name and b"train/loss" in log.read_bytes()
    assert list(folder.glob("files/media/images/val/pictures_*.png"))
    assert metrics(tmp_path / "tracked") == metrics(tmp_path / "plain")
