"""The benchmark measures two different things, and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_record_of_a_small_case(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    small = ["--layers", "3", "--head-dim", "16", "--dual-layers", "1", "--latent-size", "16"]
    short = ["--repeats", "1", "--steps", "1", "--threads", "1", "--out", str(out)]
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), *small, *short]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["case"]["layers"] == 3
    assert len(record["runs"]["ours"]) == len(record["runs"]["plain"]) == 1
    assert record["hardware"] and record["command"].startswith("python tools/benchmark.py")
    # Even so small, keeping every graph must show: no bound on the ratio, only its direction.
    plain, ours = (record["median"][side]["peak_growth_mib"] for side in ("plain", "ours"))
    assert 0 < ours < plain
    assert record["memory_ratio"] == ours / plain
