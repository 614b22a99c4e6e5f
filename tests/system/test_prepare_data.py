"""tools/prepare_data.py killed in the midst of its work, and the commands of docs/data.md."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from soar_mega.data.prepare.run import prepare
from soar_mega.data.shards.index import build_index
from tests.unit.test_data_index import picture, write_tar
from tests.unit.test_data_tables import write_parquet
from tools import inspect_data, prepare_data

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"
SHARDS = 60


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_killed_and_given_again(tmp_path: Path) -> None:
    noise_HWC = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise_HWC).save(data, "PNG", compress_level=0)
    (tmp_path / "in").mkdir()
    (tmp_path / "noise").write_bytes(data.getvalue())
    for n in range(3 * SHARDS):
        os.link(tmp_path / "noise", tmp_path / "in" / f"{n:03d}.png")
        (tmp_path / "in" / f"{n:03d}.txt").write_text(f"noise {n}")
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    line = [sys.executable, str(TOOL), str(tmp_path / "in"), "--samples-per-shard=3"]
    line += ["--workers=2", "--out"]
    out, whole = tmp_path / "out", tmp_path / "whole"

    run = subprocess.Popen([*line, str(out)], env=environment(), stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (out / "train-000002.tar.index.json").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    # End of file on its output: its workers are gone too.
    assert run.communicate(timeout=60) == (b"", None)
    assert run.returncode == -signal.SIGKILL
    there = len(list(out.glob("*.index.json")))
    assert 0 < there < SHARDS

    done = subprocess.run(
        [*line, str(out)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{3 * SHARDS} samples in {SHARDS} shards ({SHARDS - there} new)" in done.stdout
    prepare([str(tmp_path / "in")], whole, samples_per_shard=3)
    assert len(contents(whole)) == 2 * SHARDS + 2
    assert contents(out) == contents(whole)


def test_commands_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "holiday").mkdir(parents=True)
    (tmp_path / "downloaded").mkdir()
    rows = []
    for n in range(3):
        name = tmp_path / "photos" / "holiday" / f"{n:032x}"
        name.with_suffix(".png").write_bytes(picture(n))
        name.with_suffix(".txt").write_text(f"caption {n}")
        rows.append({"md5": name.name, "caption_en": f"caption {n}", "bw": 512, "bh": 512})
    (tmp_path / "hy_soar.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = [{"image": f"holiday/{n:032x}.png", "caption": f"caption {n}"} for n in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, table)))
    lines = [f"{row['image']},{row['caption']}" for row in table]
    (tmp_path / "list.csv").write_text("\n".join(["image,caption", *lines]))
    for n in range(3):
        members = [(f"{n}.jpg", picture(n)), (f"{n}.txt", f"caption {n}".encode())]
        write_tar(tmp_path / "downloaded" / f"{n:05d}.tar", members)

    write_parquet(
        tmp_path / "list.parquet", {n: [row[n] for row in table] for n in ("image", "caption")}
    )

    text = (ROOT / "docs" / "data.md").read_text()
    # Encoding has tests of its own: it needs a model.
    kinds = r"(prepare|inspect)_data\.py (.*)$"
    commands = re.findall(rf"^\.venv/bin/python tools/{kinds}", text, re.MULTILINE)
    assert Counter(tool for tool, _ in commands) == {"prepare": 6, "inspect": 3}
    for tool, command in commands:
        arguments = shlex.split(command)
        if tool == "inspect":
            assert inspect_data.main(arguments) == 0, command
            continue
        out = tmp_path / arguments[arguments.index("--out") + 1]
        assert prepare_data.main(arguments) == 0, command
        index = build_index(str(out / "*.tar"))
        made = [(index.read_caption(n), index.read_image(n)) for n in range(len(index))]
        assert made == [(f"caption {n}", picture(n)) for n in range(3)], command
    assert Image.open(tmp_path / "photos.png").width > 2 * 256
    assert len(list((tmp_path / "downloaded").glob("*.index.json"))) == 3
