"""Training on encoded sets is training on their pictures, but for the rounding to bf16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from soar_mega.data.encoded.format import EMPTY
from soar_mega.data.encoded.run import EncodeProcess, EncodeSettings, encode
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.shards.index import build_index
from tests.distributed.harness import run_ranks
from tests.runs import (
    Tiny,
    assert_same_state,
    checkpoint,
    command,
    killed_in_step,
    losses,
    metrics,
    train,
)
from tests.training_data import bad_lines, keys_of, only_differ_in, recorded

SETTINGS = EncodeSettings(resolution=64, max_sequence_length=16, samples_per_shard=10, dtype="fp32")
STEPS = 4
LAYOUTS = {
    "tensor": "parallel.tensor_model_parallel_size=2",
    "pipeline": "parallel.pipeline_model_parallel_size=2",
    "data": "train.micro_batch_size=4",
}


@contextmanager
def no_encoders() -> Iterator[None]:
    """Runs inside must not load a VAE or text encoder."""

    def never(*_: Any, **__: Any) -> FrozenEncoders:
        raise AssertionError("encoders were loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenEncoders, "load", never)
        yield


@pytest.fixture(scope="module")
def sets(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``few``, ``heldout``: encoded; nobody writes into them."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("few", "heldout"):
        index = build_index(tiny.shards(name))
        encode(index, tiny.pretrained, folder / name, SETTINGS, EncodeProcess())
    return folder


def overrides(sets: Path, *more: str) -> list[str]:
    return [
        f"data.shards={sets}/few/*.tar",
        "logging.sample_ids=true",
        f"train.max_train_steps={STEPS}",
        "checkpoint.checkpointing_steps=2",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(tiny: Tiny, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, without encoders."""
    run_dir = tmp_path_factory.mktemp("alone")
    with no_encoders():
        train(tiny.config("pretrain", run_dir, *overrides(sets)))
    return run_dir


@pytest.mark.parametrize(("objective", "bound"), [("pretrain", 5e-4), ("soar", 2e-3)])
def test_losses_are_those_of_the_pictures(
    objective: str, bound: float, tiny: Tiny, sets: Path, tmp_path: Path
) -> None:
    """In the first step, whose weights are the same. Measured: pretraining's loss 1.5e-4 apart and
    its gradient norm 5e-5; SOAR's 3.7e-4 and 6.3e-4."""
    one = (f"data.shards={tiny.shards('few')}", "train.max_train_steps=1")
    train(tiny.config(objective, tmp_path / "raw", *overrides(sets), *one))
    with no_encoders():
        train(tiny.config(objective, tmp_path / "set", *overrides(sets), one[1]))
    raw, made = metrics(tmp_path / "raw")[0], metrics(tmp_path / "set")[0]
    for name in ("train/loss", "train/loss_base", "optim/grad_norm"):
        assert made[name] == pytest.approx(raw[name], rel=bound)
        assert made[name] != raw[name]


def work_on_two(tiny: Tiny, sets: Path, folder: Path) -> None:
    with no_encoders():
        for name, layout in LAYOUTS.items():
            train(tiny.config("pretrain", folder / name, *overrides(sets, layout)))


def test_layouts(tiny: Tiny, sets: Path, alone: Path, tmp_path: Path) -> None:
    run_ranks(2, work_on_two, tiny, sets, tmp_path)
    for name in LAYOUTS:
        assert keys_of(tmp_path / name) == keys_of(alone)
        assert losses(tmp_path / name) == pytest.approx(losses(alone), rel=1e-5)


def test_resumed_is_the_same_run(tiny: Tiny, sets: Path, alone: Path, tmp_path: Path) -> None:
    """Killed in step 4, with steps read ahead; step 3 is done again."""
    with no_encoders():
        with killed_in_step(STEPS):
            train(tiny.config("pretrain", tmp_path, *overrides(sets)))
        resume = "checkpoint.resume=latest"
        train(tiny.config("pretrain", tmp_path, *overrides(sets, resume)))
    assert metrics(tmp_path) == metrics(alone) and keys_of(tmp_path) == keys_of(alone)
    for step in (2, STEPS):
        assert_same_state(checkpoint(tmp_path, step), checkpoint(alone, step))


def test_validation(tiny: Tiny, sets: Path, tmp_path: Path) -> None:
    """Encoded or not, on the same weights: measured 6.2e-5 apart at most. Pictures may be flipped
    in training beside it."""
    one = ("train.max_train_steps=1", "validation.validation_steps=1", "validation.num_samples=9")
    encoded = f"validation.shards={sets}/heldout/*.tar"
    pictures = f"validation.shards={tiny.shards('heldout')}"
    train(tiny.config("pretrain", tmp_path / "raw", *overrides(sets), *one, pictures))
    with no_encoders():
        train(tiny.config("pretrain", tmp_path / "set", *overrides(sets), *one, encoded))
    raw, made = metrics(tmp_path / "raw")[0], metrics(tmp_path / "set")[0]
    names = [name for name in raw if name.startswith("val/")]
    assert len(names) == 9
    for name in names:
        assert made[name] == pytest.approx(raw[name], rel=2e-4)
        assert made[name] != raw[name]
    flips = (f"data.shards={tiny.shards('few')}", "data.random_flip=true")
    train(tiny.config("pretrain", tmp_path / "mixed", *overrides(sets), *one, encoded, *flips))
    assert "val/loss" in metrics(tmp_path / "mixed")[0]


@pytest.mark.parametrize("setting", ["data.shards", "validation.shards"])
@pytest.mark.parametrize("fault", ["no empty prompt", "another model", "not finished"])
def test_refused_sets(
    setting: str,
    fault: str,
    tiny: Tiny,
    sets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "few" if setting == "data.shards" else "heldout"
    copy = shutil.copytree(sets / name, tmp_path / "set")
    more = [f"{setting}={copy}/*.tar", "validation.num_samples=9"]
    if name == "heldout":
        more += ["validation.validation_steps=1", f"data.shards={tiny.shards('few')}"]
    words = [f"{setting}: ", "tools/encode_data.py"]
    if fault == "no empty prompt":
        (copy / EMPTY).unlink()
        words += [EMPTY, "Copy it from the set"]
    elif fault == "not finished":
        (copy / "encoded.json").unlink()
        words += ["encoded.json", "not finished"]
    else:
        other = shutil.copytree(tiny.pretrained, tmp_path / "other")
        weights = other / "vae" / "diffusion_pytorch_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        more.append(f"model.pretrained={other}")
        words = [f"model.pretrained='{other}' is not what {setting}", "other vae", words[1]]
    assert command(tiny.arguments("pretrain", tmp_path / "run", *overrides(sets), *more)) == 78
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["random_flip", "random_crop", "cache_encoded"])
def test_what_only_pictures_can_follow_is_refused(
    name: str, tiny: Tiny, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.arguments("pretrain", tmp_path / "run", *overrides(sets), f"data.{name}=true")
    assert command(arguments) == 78
    message = capsys.readouterr().err
    assert f"data.{name} = true: data.shards are encoded sets" in message
    assert "Set it to false" in message


def test_a_damaged_payload(tiny: Tiny, sets: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sets / "few", tmp_path / "few")
    tar = copy / "encoded-000001.tar"
    sample = json.loads(Path(f"{tar}.index.json").read_text())["samples"][3]
    with open(tar, "r+b") as file:
        file.seek(sample["payload"][0] + 100)
        file.write(b"\xff\xff")  # NaN in bf16
    once = ("train.global_batch_size=20", "train.max_train_steps=1")
    steps = {}
    for folder in (sets, tmp_path):
        with no_encoders(), recorded() as steps[folder]:
            run_dir = tmp_path / f"run-{folder.name}"
            train(tiny.config("pretrain", run_dir, *overrides(folder), *once))
    assert bad_lines(run_dir) == [(1, sample["key"], "damaged payload")]
    assert metrics(run_dir)[0]["data/bad_samples"] == 1
    (slot,) = (slot for slot, key in keys_of(run_dir)[1].items() if key == sample["key"])
    whole, damaged = steps[sets][0], steps[tmp_path][0]
    only_differ_in(whole, damaged, {slot})
    assert whole[slot].weight == 1 and damaged[slot].weight == 0
    assert torch.isfinite(damaged[slot].clean_CHW).all()
