"""The benchmark measures two different things, and says what it measured."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from soar_mega.training import benchmark_data
from tests.runs import Tiny

ROOT = Path(__file__).resolve().parents[2]


SMALL = ["--layers", "3", "--head-dim", "16", "--dual-layers", "1", "--latent-size", "16"]


def record_of(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "result.json"
    short = ["--repeats", "1", "--out", str(out)]
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), *arguments, *short]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_training_step_on_the_cpu(tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    sides = ["--no-reference", "--variant", "", "--variant", "side=reference"]
    short = ["--steps", "1", "--warmup", "1", "--threads", "1", "--micro-batch", "4"]
    record = record_of(tmp_path, "cpu", *SMALL, *sides, *short, "--plot", str(picture))
    assert record["command"].startswith("python tools/benchmark.py cpu")
    assert record["hardware"]["cpu"] and record["versions"]["torch"] == torch.__version__
    assert record["matrix_tflops"] > 0
    (table,) = record["tables"]
    assert table["load"]["architecture"]["num_layers"] == 3 and table["load"]["dtype"] == "fp32"
    ours, plain = table["sides"]
    assert (ours["factor"], plain["factor"]) == (22, 23)
    for side in (ours, plain):
        (run,) = side["runs"]
        assert run["seconds"] == [side["median"]["seconds"]] and math.isfinite(run["loss"])
        assert side["median"]["samples_per_s"] == pytest.approx(4 / run["seconds"][0])
        rate = side["median"]["samples_per_s"] * side["factor"] * table["forward_tflop"]
        assert side["median"]["model_tflops"] == pytest.approx(rate)
    # Even so small, keeping every graph must show: no bound on the ratio, only its direction.
    growth = [side["median"]["peak_growth_bytes"] for side in (ours, plain)]
    assert 0 < growth[0] < growth[1]
    assert ours["ratios"]["same recomputation"]["memory"] == growth[0] / growth[1]
    assert "reference, no checkpointing" in picture.read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--plot", "picture.jpg"], "must end in .png or .svg"),
        (["--out", "missing/result.json"], "no folder missing"),
        (["--variant", "fp8_recipe=block"], "add backend=te"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_first(
    flags: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tools/benchmark.py", "cpu", *flags])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools/benchmark.py"), run_name="__main__")
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_schedules_that_sleep(tmp_path: Path) -> None:
    """No bound on what is measured but that it cannot be faster than the sleeping."""
    record = record_of(tmp_path, "schedules", "--processes", "2", "--unit", "0.002")
    found = record["times_as_fast_as_sequential"]
    assert list(found) == ["sequential", "1f1b", "zero_bubble", "zero_bubble_v"]
    assert found["sequential"] == {"measured": 1, "simulated": 1}
    assert found["zero_bubble"]["simulated"] == pytest.approx(51 / 45)
    for name, seconds in record["seconds"].items():
        assert all(s >= 44 * 0.002 for s in seconds) and 0 < record["bubble"][name] < 1


def test_schedules_on_a_model(tmp_path: Path) -> None:
    flags = ["--trajectory-length", "2", "--layers", "4", "--schedule", "zero_bubble_v"]
    record = record_of(tmp_path, "pipeline", *SMALL, *flags)
    assert list(record["seconds"]) == ["sequential", "zero_bubble_v"]
    assert record["case"]["threads"] == 1
    for ratio in record["times_as_fast_as_sequential"].values():
        assert ratio["measured"] > 0 and ratio["simulated"] > 0


def test_data(tmp_path: Path) -> None:
    """No bound on what is measured; the sides' samples are compared by the benchmark itself."""
    flags = ["--pictures", "4", "--sizes", "96x72", "32x32", "--resolution", "32", "--batch", "2"]
    record = record_of(tmp_path, "data", *flags, "--samples", "16", "--order-samples", "5000")
    sides = {"ours, PIL", "plain webdataset", "DataLoader over files"}
    for size in ("96x72", "32x32"):
        found = record["pictures"][size]
        assert sides <= set(found["median"])
        assert found["median"]["plain webdataset"]["times_as_fast"] == 1
        for name, one in found["median"].items():
            (run,) = found["runs"][name]
            assert one["samples_per_s"] == pytest.approx(4 / run["seconds"])
            assert one["cpu_ms_per_sample"] == pytest.approx(250 * run["cpu_seconds"])
            assert run["cpu_seconds"] > 0
            core = found["per_core"][name]
            assert core["pictures_per_s"] == pytest.approx(4 / run["cpu_seconds"])
        assert found["per_core"]["ours, PIL"]["times_one_core_of_pil"] == 1
    encoded = record["encoded"]
    assert encoded["sample_bytes"] == 2 * (32 * 64 * 64 + 77 * (2048 + 4096) + 2048)
    assert encoded["tar_bytes"] > 16 * encoded["sample_bytes"]
    speed = {name: one["times_as_fast"] for name, one in encoded["median"].items()}
    assert encoded["ours_of_bare_read"]["one buffer for all"] == pytest.approx(
        speed["ours, one buffer for all"] / speed["bare read, one buffer for all"]
    )
    assert set(record["order"]["median"]) == {"start", "end", "across"}


def test_data_refuses_a_side_with_other_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A side that decodes something else would measure something else."""
    case = benchmark_data.PictureCase(pictures=4, batch=2, resolution=32)
    real = benchmark_data.to_model_range
    monkeypatch.setattr(benchmark_data, "to_model_range", lambda pixels: real(pixels) + 0.1)
    with pytest.raises(RuntimeError, match="ours, PIL: pixels differ"):
        benchmark_data.measure_pictures(case, (96, 72), 1, tmp_path)


def test_saving_in_the_background_and_at_once(tmp_path: Path) -> None:
    record = record_of(tmp_path, "checkpoint", "--million-parameters", "5")
    assert record["hardware"]
    assert {"at once", "in the background"} <= record["median"]["stall_s"].keys()


def test_converters_are_bit_equal_by_way_of_another_layout(tiny: Tiny, tmp_path: Path) -> None:
    """The benchmark itself compares every byte, and fails where one differs."""
    record = record_of(tmp_path, "convert", "--architecture", str(tiny.pretrained))
    assert record["bit_equal_through_tensor_and_pipeline_parallel"] == [2, 2]
