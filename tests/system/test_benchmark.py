"""The benchmark measures two different things, and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_record_of_a_small_case(tmp_path: Path) -> None:
    record = record_of(tmp_path, "step", *SMALL, "--steps", "1", "--threads", "1")
    assert record["case"]["layers"] == 3
    assert len(record["runs"]["ours"]) == len(record["runs"]["plain"]) == 1
    assert record["hardware"] and record["command"].startswith("python tools/benchmark.py")
    # Even so small, keeping every graph must show: no bound on the ratio, only its direction.
    plain, ours = (record["median"][side]["peak_growth_mib"] for side in ("plain", "ours"))
    assert 0 < ours < plain
    assert record["memory_ratio"] == ours / plain


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
