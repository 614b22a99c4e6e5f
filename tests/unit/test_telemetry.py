"""Metrics on disk, the console, the tracker, and FLOPs."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from soar_mega.config import ConfigError, LoggingConfig
from soar_mega.telemetry import (
    MetricsWriter,
    Progress,
    open_tracker,
    read_metrics,
)
from soar_mega.telemetry.files import put_aside
from soar_mega.telemetry.progress import format_duration, format_rate

# --- metrics.jsonl -----------------------------------------------------------------------------


def write_steps(folder: Path, steps: range, resume_step: int = 0) -> None:
    with MetricsWriter(folder, resume_step) as metrics:
        for step in steps:
            metrics.write(step, {"train/loss": 1 / step, "optim/lr": 0.1 * step})


def test_resumed_file_equals_an_unbroken_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole", range(1, 13))
    write_steps(tmp_path / "parts", range(1, 10))
    write_steps(tmp_path / "parts", range(6, 12), resume_step=5)
    write_steps(tmp_path / "parts", range(12, 13), resume_step=11)
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()
    assert [line["step"] for line in read_metrics(tmp_path / "parts")] == list(range(1, 13))


@pytest.mark.parametrize("torn", [b'{"step": 6, "train/l', b'{"step": 6}', b"\0\0\0\0\n"])
def test_resume_cuts_a_torn_line(tmp_path: Path, torn: bytes) -> None:
    write_steps(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read_metrics(tmp_path)) == 5
    MetricsWriter(tmp_path, resume_step=8).close()
    assert path.read_bytes() == whole


def test_fresh_start_puts_an_old_file_aside(tmp_path: Path) -> None:
    for _ in range(3):
        write_steps(tmp_path, range(1, 4))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert len(read_metrics(tmp_path)) == 3


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(
            1,
            {
                "nan": math.nan,
                "inf": -math.inf,
                "tensor": torch.tensor(0.5),
                "bad_tensor": torch.tensor(torch.inf),
                "numpy": np.float32(0.25),
                "numpy64": np.float64("nan"),
                "bins": [1.0, math.nan],
                "nested": {"a": (math.inf, None, True, "x")},
            },
        )
    (raw,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict: dict[str, Any] = json.loads(raw, parse_constant=pytest.fail)
    assert strict == {
        "step": 1,
        "nan": None,
        "inf": None,
        "tensor": 0.5,
        "bad_tensor": None,
        "numpy": 0.25,
        "numpy64": None,
        "bins": [1.0, None],
        "nested": {"a": [None, None, True, "x"]},
    }


def test_floats_keep_every_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {"x": value})
    assert read_metrics(tmp_path)[0]["x"] == value


def test_lines_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path)
    metrics.write(1, {"x": 1})
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1}]
    metrics.close()


def test_a_step_is_written_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resume_step=4) as metrics:
        metrics.write(5, {})
        for step in (5, 3):
            with pytest.raises(ValueError, match="comes after step 5"):
                metrics.write(step, {})
        with pytest.raises(ValueError, match="key 'step'"):
            metrics.write(6, {"step": 6})
        with pytest.raises(TypeError, match="metric x must be"):
            metrics.write(6, {"x": object()})
    assert len(read_metrics(tmp_path)) == 1


# --- console -----------------------------------------------------------------------------------

METRICS = {
    "train/loss": 0.12341,
    "optim/grad_norm": 0.981,
    "optim/lr": 1e-4,
    "perf/samples_per_s": 12.34,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(100, stream=stream, clock=lambda: now[0])
    now[0] = 4.0
    progress.update(10, METRICS)
    progress.note("checkpoint saved")
    progress.update(11, {"train/loss": None})
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step  10/100  loss 0.1234  grad_norm 0.98  lr 1e-4  12.3 samples/s  eta 0:36",
        "checkpoint saved",
        "step  11/100  eta 0:32",
    ]


def test_plain_lines_come_every_so_often_and_at_the_end() -> None:
    stream = io.StringIO()
    progress = Progress(7, every=3, stream=stream)
    for step in range(1, 8):
        progress.update(step, {})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["3/7", "6/7", "7/7"]


def test_time_left_counts_the_steps_of_this_process_only() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(100, start=90, stream=stream, clock=lambda: now[0])
    now[0] = 5.0
    progress.update(95, {})
    assert stream.getvalue().endswith("eta 0:05\n")


def test_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = Progress(10, start=3, stream=stream)
    for step in range(4, 11):
        progress.update(step, METRICS)
    progress.note("checkpoint saved")
    progress.close()
    shown = stream.getvalue()
    assert "10/10" in shown
    assert "\r" in shown
    assert "loss 0.1234" in shown
    assert "checkpoint saved\n" in shown


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (0.1, "1e-1"), (3, "3e0")]
)
def test_rates(value: float, text: str) -> None:
    assert format_rate(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (12.4, "0:12"), (59.6, "1:00"), (3723, "1:02:03"), (183845, "2d 3:04:05")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# --- tracker -----------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, calls: list[tuple[str, Any]], run_id: str) -> None:
        self.calls, self.id, self.broken = calls, run_id, False

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("define_metric", (args, kwargs)))

    def log(self, values: dict[str, Any]) -> None:
        self.calls.append(("log", values))
        if self.broken:
            raise RuntimeError("no network")

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    fake = SimpleNamespace(calls=[], runs=[], Image=lambda path: ("image", path))

    def init(**kwargs: Any) -> FakeRun:
        fake.calls.append(("init", kwargs))
        fake.runs.append(FakeRun(fake.calls, kwargs["id"] or f"id{len(fake.runs)}"))
        run: FakeRun = fake.runs[-1]
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    yield fake


def opened(folder: Path, resumed: bool = False, **settings: Any) -> Any:
    logging_config = LoggingConfig(wandb_project="p", **settings)
    return open_tracker(logging_config, folder, name=None, config={"a": 1}, resumed=resumed)


def test_no_project_no_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_tracker(LoggingConfig(), tmp_path, name=None, config={}, resumed=False)
    tracker.log(1, {"x": 1})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_missing_wandb_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb_project = 'p' needs .*soar-mega\[wandb"):
        opened(tmp_path)


def test_steps_are_a_key_of_our_own(tmp_path: Path, fake_wandb: SimpleNamespace) -> None:
    tracker = opened(tmp_path)
    tracker.log(3, {"train/loss": 0.5})
    tracker.log_image(3, "grid", "a.png")
    tracker.finish(1)
    assert ("define_metric", (("*",), {"step_metric": "step"})) in fake_wandb.calls
    assert fake_wandb.calls[-3:] == [
        ("log", {"step": 3, "train/loss": 0.5}),
        ("log", {"step": 3, "grid": ("image", "a.png")}),
        ("finish", 1),
    ]


def test_resumed_run_keeps_its_id_and_a_fresh_one_does_not(
    tmp_path: Path, fake_wandb: SimpleNamespace
) -> None:
    for resumed in (False, True, False):
        opened(tmp_path, resumed)
    inits = [kwargs for name, kwargs in fake_wandb.calls if name == "init"]
    assert [kwargs["id"] for kwargs in inits] == [None, "id0", None]
    assert [kwargs["resume"] for kwargs in inits] == [None, "allow", None]
    assert (tmp_path / "wandb_run_id.txt").read_text() == "id2\n"


def test_a_failing_tracker_never_stops_training(
    tmp_path: Path, fake_wandb: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = opened(tmp_path)
    fake_wandb.runs[0].broken = True
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            tracker.log(step, {})
        tracker.finish()
    assert len([name for name, _ in fake_wandb.calls if name == "log"]) == 1
    assert caplog.text.count("no network") == 1

    def refuse(**kwargs: Any) -> None:
        raise RuntimeError("no login")

    fake_wandb.init = refuse
    opened(tmp_path).log(1, {})
    assert "no login" in caplog.text


OFFLINE_RUN = """
import sys
from soar_mega.config import LoggingConfig
from soar_mega.telemetry import open_tracker
settings = LoggingConfig(wandb_project="p", wandb_mode="offline")
tracker = open_tracker(settings, sys.argv[1], name=None, config={"a": 1}, resumed=True)
tracker.log(int(sys.argv[2]), {"train/loss": 0.5})
tracker.finish()
"""


def test_wandb_offline(tmp_path: Path) -> None:
    # In a process of its own: wandb's background service writes the last of it as the process ends.
    pytest.importorskip("wandb")
    ids = []
    for step in ("3", "4"):
        subprocess.run([sys.executable, "-c", OFFLINE_RUN, tmp_path, step], check=True, timeout=120)
        ids.append((tmp_path / "wandb_run_id.txt").read_text().strip())
    assert ids[0] == ids[1] != ""
    stored = list((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    assert len(stored) == 2
    assert all(b"train/loss" in path.read_bytes() for path in stored)


def test_put_aside_takes_the_first_free_number(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    put_aside(path)  # nothing there: nothing to do
    for text in ("one", "two"):
        path.write_text(text)
        put_aside(path)
    assert not path.exists()
    assert [(tmp_path / f"env.{n}.json").read_text() for n in (1, 2)] == ["one", "two"]
