"""The demo's steps fit together: a short one, from making the data to the diffusers folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_short_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "demo with a space"
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--out", str(out), "--pictures", "3"]
    for setting in (
        "pretrain.train.max_train_steps=3",
        "pretrain.train.global_batch_size=8",
        "pretrain.train.micro_batch_size=8",
        "soar.train.max_train_steps=1",
        "soar.train.global_batch_size=8",
        "soar.train.micro_batch_size=8",
    ):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert set(report["scores"]) == {"pretrained", "after SOAR"}
    for scores in report["scores"].values():
        assert scores["pictures"] == 3
        assert 0 <= scores["per_digit_accuracy"] <= 1
    assert Image.open(out / "before_after.png").size[0] > 300
    assert (out / "export" / "model_index.json").is_file()
    assert (out / "export" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert len(list((out / "pictures").glob("*.png"))) == 3
    for place in ("before_after.png", "report.json", "export", "tools/generate.py"):
        assert place in done.stdout
    lineage = json.loads((out / "soar/checkpoints/step-00000001/trainer.json").read_text())[
        "lineage"
    ]
    parent, fresh = lineage["parents"]
    assert (parent["step"], parent["objective"]) == (3, "flow_matching")
    assert fresh == {"fresh weights": "seed 0"}
    assert lineage["objective"] == "soar"


def test_a_failing_step_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--out", str(tmp_path / "x")]
    command += ["--set", "pretrain.train.no_such_key=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "train.no_such_key" in done.stderr
    assert "the step 'pretrain' failed with exit code" in done.stderr


def test_what_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--out", str(tmp_path)]
    precious = tmp_path / "pretrain" / "precious"
    precious.parent.mkdir()
    precious.write_text("mine")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "holds pretrain that no demo made" in done.stderr
    assert precious.read_text() == "mine"
