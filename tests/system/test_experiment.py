"""The experiment's steps fit together, on a few pages; a second call trains nothing anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from soar_mega.evaluation.experiment.arms import SAMPLINGS, SFT, SOAR, STEPS
from soar_mega.evaluation.experiment.report import write_report
from soar_mega.evaluation.experiment.run import Experiment

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
)


def test_short_experiment(tmp_path: Path) -> None:
    experiment = Experiment(ROOT, tmp_path, seeds=1, pictures=8, pages=32, overrides=SHORT)
    arms = [arm.longer(2 / STEPS) for arm in (SFT, SOAR)]
    found = experiment.run(arms, SAMPLINGS[:1])
    assert "SOAR minus SFT" in write_report(tmp_path, found, arms, experiment.seeds)
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["steps"] == {"sft": 2, "soar": 2}
    for arm in arms:
        assert 0 <= content["by_seed"][arm.name]["guided"]["handwriting/correct"][0] <= 1
        record = tmp_path / f"runs/{arm.name}-1/checkpoints/step-00000002/trainer.json"
        lineage = json.loads(record.read_text())["lineage"]
        assert lineage["objective"] == {"sft": "flow_matching", "soar": "soar"}[arm.name]
    assert Image.open(tmp_path / "scores.png").size[0] > 500
    # Pretrained: pages are legible before any training here.
    frechet = found["guided"]["scorers"]["handwriting_frechet"]["models"]["base"]["pixels"]
    assert frechet["overall"]["value"] < 1
    experiment.measure_exposure(arms, SAMPLINGS[0])
    exposure = json.loads((tmp_path / "exposure/exposure_bias.json").read_text())
    assert (exposure["samples"], exposure["steps"]) == (8, SAMPLINGS[0].steps)
    assert list(exposure["models"]) == ["sft", "soar"]
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    before = [path.stat().st_mtime_ns for path in files]
    assert experiment.run(arms, SAMPLINGS[:1]) == found
    assert [path.stat().st_mtime_ns for path in files] == before


def test_a_folder_holds_one_experiment(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(
        '{"pages": 4096, "pictures": 512, "steps": 100, "set": []}'
    )
    command = [sys.executable, str(ROOT / "tools/experiment.py"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--steps", "400"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "made with steps 100, now it is 400" in done.stderr and "--out" in done.stderr


def test_a_failing_step_names_its_log(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/experiment.py"), "--out", str(tmp_path / "x")]
    command += ["--pages", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the step 'make pages' failed" in done.stderr
    log = Path(done.stderr.strip().rsplit("see ", 1)[1])
    assert "must be at least 0" in log.read_text()
