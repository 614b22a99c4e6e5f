"""tools/encode_data.py on several processes, killed in the midst of its work, and as documented."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from soar_mega.data.encoded.format import DESCRIPTOR
from soar_mega.data.encoded.read import EncodedSet
from soar_mega.data.shards.index import build_index
from tests.runs import TRAIN, Tiny
from tools import encode_data

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 24


def arguments(tiny: Tiny, out: Path) -> list[str]:
    line = [tiny.shards("train"), "--pretrained", str(tiny.pretrained), "--out", str(out)]
    return [*line, "--resolution=64", "--max-sequence-length=16", "--samples-per-shard=2"]


def start(tiny: Tiny, out: Path, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    """A rank with torchrun's variables."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    more = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    line = [sys.executable, str(ROOT / "tools" / "encode_data.py"), *arguments(tiny, out)]
    return subprocess.Popen(line, env=environment() | more, stdout=subprocess.PIPE)


def environment() -> dict[str, str]:
    """As many threads as here: sums on a CPU depend on their number."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an unbroken run of one process."""
    out = tmp_path_factory.mktemp("whole")
    assert encode_data.main(arguments(tiny, out)) == 0
    return contents(out)


def kill_in_the_midst(tiny: Tiny, out: Path, world_size: int) -> None:
    """Start so many ranks and kill them when the first shard is there."""
    runs = [start(tiny, out, rank, world_size) for rank in range(world_size)]
    deadline = time.monotonic() + 300
    while not list(out.glob("*.index.json")):
        assert all(run.poll() is None for run in runs) and time.monotonic() < deadline
        time.sleep(0.001)
    for run in runs:
        run.send_signal(signal.SIGKILL)
    for run in runs:
        run.communicate(timeout=60)
        assert run.returncode == -signal.SIGKILL
    assert 0 < len(list(out.glob("*.index.json"))) < SHARDS
    assert not (out / DESCRIPTOR).exists()


def test_two_killed_and_given_again_to_one(
    tiny: Tiny, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(whole) == 2 * SHARDS + 4
    out = tmp_path / "out"
    kill_in_the_midst(tiny, out, 2)
    there = len(list(out.glob("*.index.json")))
    assert encode_data.main(arguments(tiny, out)) == 0
    assert f"48 samples in 24 shards ({SHARDS - there} new)" in capsys.readouterr().out
    assert contents(out) == whole


@pytest.mark.full
def test_three_killed_and_given_again_to_two(
    tiny: Tiny, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kill_in_the_midst(tiny, out, 3)
    runs = [start(tiny, out, rank, 2) for rank in range(2)]
    printed = b"".join(run.communicate(timeout=300)[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert printed.count(b"48 samples in 24 shards") >= 1
    assert contents(out) == whole


@pytest.mark.full
def test_torchrun(tiny: Tiny, whole: dict[str, bytes], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "--standalone"]
    line += [str(ROOT / "tools" / "encode_data.py"), *arguments(tiny, tmp_path / "out")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 2: encoded-000023.tar (8 of 8): 2 samples, 0 refused" in done.stderr
    assert contents(tmp_path / "out") == whole


def test_commands_of_the_docs(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.folder / "shards", "shards/photos")
    os.symlink(tiny.pretrained, "sd35")
    text = (ROOT / "docs" / "data.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^\.venv/bin/(?:python|torchrun) .*encode_data\.py.*$", text, re.M)
    assert len(commands) == 2
    for command in commands:
        _, after = command.split("tools/encode_data.py")
        # The tiny VAE and 512 px pictures would take a while; the tokens are the tiny T5's.
        given = shlex.split(after.replace("512", "64").replace("256", "16"))
        assert encode_data.main(given) == 0
        out = Path(given[given.index("--out") + 1])
        index = build_index(str(out / "*.tar"))
        assert len(index) == TRAIN + 20 + 16
        EncodedSet.open(index).close()
        assert (out / "refused.jsonl").read_text() == ""
        shutil.rmtree(out)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        encode_data.main(["--help"])
    printed = capsys.readouterr().out
    assert "torchrun --nproc-per-node" in printed and max(map(len, printed.splitlines())) <= 100
