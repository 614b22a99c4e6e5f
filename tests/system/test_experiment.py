"""The experiment's steps fit together, on a few pages; a second call does nothing anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_short_experiment(tmp_path: Path) -> None:
    out = tmp_path / "experiment"
    command = [sys.executable, str(ROOT / "tools/experiment.py"), "--out", str(out)]
    command += ["--seeds", "1", "--pages", "32", "--pictures", "8"]
    for setting in (
        "train.max_train_steps=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "checkpoint.checkpointing_steps=2",
        "validation.validation_steps=null",
    ):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    logs = "".join(path.read_text()[-2000:] for path in (out / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "SOAR minus SFT" in done.stdout
    content = json.loads((out / "summary.json").read_text())
    arms = {"sft", "soar", "independent", "ideal", "sft_compute"}
    assert content["by_seed"].keys() == arms
    for arm in arms:
        for metrics in content["by_seed"][arm].values():
            assert 0 <= metrics["handwriting/correct"][0] <= 1
    assert Image.open(out / "scores.png").size[0] > 500
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith(done.stdout[done.stdout.index("SOAR minus SFT") :])
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    assert before == after


def test_a_failing_step_names_its_log(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/experiment.py"), "--out", str(tmp_path / "x")]
    command += ["--pages", "12", "--pictures", "2", "--set", "train.no_such_key=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the step 'train s" in done.stderr
    log = Path(done.stderr.strip().rsplit("see ", 1)[1])
    assert "train.no_such_key" in log.read_text()
