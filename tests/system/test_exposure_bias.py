"""tools/exposure_bias.py on the tiny model, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import Tiny, train
from tools import encode_data

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, STEPS = 4, 3


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "exposure_bias.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_folder_and_a_checkpoint_on_pictures(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run, out = tmp_path / "a run", tmp_path / "out"
    train(tiny.config("soar", run, "train.max_train_steps=1"))
    few = (f"--samples={SAMPLES}", f"--steps={STEPS}", "--batch=3")
    held_out = ("--shards", tiny.shards("heldout"), "--resolution=64", "--max-sequence-length=16")
    done = start(str(tiny.pretrained), f"soar={run}", *held_out, *few, "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "exposure_bias.json").read_text())
    assert list(found["models"]) == ["sd35", "soar"]
    assert (found["samples"], found["steps"]) == (SAMPLES, STEPS)
    assert (out / "exposure_bias.png").is_file()
    assert found["differences"]["soar"]["drift"]["1"]["error"][-1] > 0
    assert "law distance" in done.stdout

    encoded = tmp_path / "encoded"
    line = [tiny.shards("heldout"), "--pretrained", str(tiny.pretrained), "--out", str(encoded)]
    assert encode_data.main([*line, "--resolution=64", "--max-sequence-length=16"]) == 0
    shards = ("--shards", str(encoded / "*.tar"))
    done = start(f"sd35={tiny.pretrained}", *shards, *few, "--out", str(tmp_path / "other"))
    assert done.returncode == 0, done.stderr
    other = json.loads((tmp_path / "other" / "exposure_bias.json").read_text())
    # Encoded samples are kept in bf16.
    one, two = (part["models"]["sd35"]["drift"]["1"]["mean"][-1] for part in (found, other))
    assert one == pytest.approx(two, rel=0.02)

    done = start(str(tiny.pretrained), *shards, "--samples=999", "--out", str(tmp_path / "third"))
    assert done.returncode == 1
    assert "--samples 999" in done.stderr
    assert "Traceback" not in done.stderr
