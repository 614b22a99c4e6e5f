"""Which samples a run trains on: the same list, however it is run, killed or resumed.

Everything that could disturb the order is on: two sources with weights, windows of shards, aspect
buckets, random crops and flips, a bad sample.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from soar_mega.data.prepare.run import prepare
from tests.distributed.harness import run_ranks
from tests.runs import REPOSITORY, Tiny, checkpoint, metrics, train

SAMPLES, BATCH, STEPS = (26, 14), 12, 9  # 108 samples of sources of 26 and 14: over 2.5 epochs
# Step -> slot -> (epoch, shard, key).
Ids = dict[int, dict[int, tuple[int, str, str]]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of small shards of pictures of four shapes; one picture is damaged."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = [(80, 80), (96, 60), (60, 100), (70, 64)]
    found = []
    for source, count in enumerate(SAMPLES):
        photos = folder / f"photos-{source}"
        photos.mkdir()
        for number in range(count):
            colour = (number * 37 % 256, number * 91 % 256, 90 * source)
            Image.new("RGB", sizes[number % 4], colour).save(photos / f"{number:02d}.jpg")
            (photos / f"{number:02d}.txt").write_text(f"colour {number % 5}")
        out = folder / f"shards-{source}"
        prepare([str(photos)], out, samples_per_shard=5)
        found.append(out)
    tar = found[0] / "train-000001.tar"
    index = json.loads((found[0] / "train-000001.tar.index.json").read_text())
    offset, size = index["samples"][2]["image"]
    data = bytearray(tar.read_bytes())
    data[offset : offset + size] = bytes(size)
    tar.write_bytes(data)
    return found


def overrides(shards: list[Path]) -> list[str]:
    sources = ", ".join(
        f"{{name: {path.name}, shards: '{path}/*.tar', weight: {weight}}}"
        for path, weight in zip(shards, (2, 1), strict=True)
    )
    return [
        "data.shards=null",
        f"data.sources=[{sources}]",
        "data.shuffle_shards=2",
        "data.max_aspect_ratio=2",
        "data.bucket_group_size=1",
        "data.random_crop=true",
        "data.random_flip=true",
        "logging.sample_ids=true",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_size=1",
        f"train.max_train_steps={STEPS}",
        "checkpoint.checkpointing_steps=2",
    ]


def ids(run_dir: Path) -> Ids:
    """What the ranks wrote; of a step that was done twice the last."""
    found: Ids = {}
    for path in sorted((run_dir / "sample_ids").iterdir()):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            slots = found.setdefault(record["step"], {})
            for slot, epoch, shard, key in record["samples"]:
                slots[slot] = (epoch, shard, key)
    return found


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken")
    train(tiny.config("pretrain", run_dir, *overrides(shards)))
    return run_dir


def test_every_sample_once_an_epoch(unbroken: Path, shards: list[Path]) -> None:
    found = ids(unbroken)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert all(sorted(slots) == list(range(BATCH)) for slots in found.values())
    draws = Counter(sample for slots in found.values() for sample in slots.values())
    assert set(draws.values()) == {1}
    for path, count in zip(shards, SAMPLES, strict=True):
        own = [draw for draw in draws if Path(draw[1]).parent == path]
        for epoch in (0, 1):  # whole ones
            assert sum(draw[0] == epoch for draw in own) == count
        assert {draw[0] for draw in own} == {0, 1, 2}
    # The damaged picture was listed each time, and nothing else.
    lines = [p.read_text().splitlines() for p in (unbroken / "bad_samples").iterdir()]
    bad = [json.loads(line) for some in lines for line in some]
    assert {line["kind"] for line in bad} == {"not an image"} and len(bad) in (2, 3)
    last = metrics(unbroken)[-1]
    assert last["data/bad_samples"] == len(bad) and last["data/epoch/shards-1"] > 2.5


def test_workers_change_nothing(
    tiny: Tiny, shards: list[Path], unbroken: Path, tmp_path: Path
) -> None:
    for workers in (0, 1, 4):
        run_dir = tmp_path / str(workers)
        more = (f"data.num_workers={workers}", f"data.prefetch_steps={1 + workers}")
        train(tiny.config("pretrain", run_dir, *overrides(shards), *more))
        assert ids(run_dir) == ids(unbroken)
        assert metrics(run_dir) == metrics(unbroken)


@pytest.mark.full
def test_workers_change_nothing_with_dali(
    tiny: Tiny, shards: list[Path], unbroken: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    for workers in (0, 1, 4):
        run_dir = tmp_path / str(workers)
        more = (f"data.num_workers={workers}", "data.decoder=dali")
        train(tiny.config("pretrain", run_dir, *overrides(shards), *more))
        assert ids(run_dir) == ids(unbroken)
        assert metrics(run_dir) == metrics(tmp_path / "0")


@pytest.mark.parametrize("decoder", ["pil", pytest.param("dali", marks=pytest.mark.full)])
def test_killed_and_resumed(
    decoder: str, tiny: Tiny, shards: list[Path], unbroken: Path, tmp_path: Path
) -> None:
    """SIGKILL at two random moments, with steps read ahead."""
    more = ("data.prefetch_steps=3", f"data.decoder={decoder}")
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
        whole = tmp_path / "whole"
        train(tiny.config("pretrain", whole, *overrides(shards), *more))
        assert ids(whole) == ids(unbroken)
    else:
        whole = unbroken
    run_dir = tmp_path / "run"
    arguments = tiny.arguments("pretrain", run_dir, *overrides(shards), *more)
    command = [sys.executable, "-m", "soar_mega.train", *arguments, "checkpoint.resume=latest"]
    seed = random.randrange(1000)
    stops = sorted(random.Random(seed).sample(range(2, STEPS - 1), 2))
    for stop in stops:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < stop:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(metrics(run_dir)) < STEPS
        assert not checkpoint(run_dir, STEPS).exists()
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 0
    assert ids(run_dir) == ids(whole), f"seed {seed}: killed after steps {stops}"
    assert metrics(run_dir) == metrics(whole)


def on_two(tiny: Tiny, shards: list[Path], folder: Path) -> None:
    for kind in ("tensor", "pipeline"):
        size = f"parallel.{kind}_model_parallel_size=2"
        train(tiny.config("pretrain", folder / kind, *overrides(shards), size))
    go_on(tiny, shards, folder, 4)


def go_on(tiny: Tiny, shards: list[Path], folder: Path, steps: int) -> None:
    more = ("checkpoint.resume=latest", f"train.max_train_steps={steps}")
    train(tiny.config("pretrain", folder / "data", *overrides(shards), *more))


def test_other_layouts_and_other_numbers_of_ranks(
    tiny: Tiny, shards: list[Path], unbroken: Path, tmp_path: Path
) -> None:
    """Tensor and pipeline peers; data parallel 2, then 4, then 3, in the middle of epochs."""
    run_ranks(2, on_two, tiny, shards, tmp_path)
    run_ranks(4, go_on, tiny, shards, tmp_path, 6)
    run_ranks(3, go_on, tiny, shards, tmp_path, STEPS)
    for name in ("tensor", "pipeline", "data"):
        assert ids(tmp_path / name) == ids(unbroken), name
        assert len(metrics(tmp_path / name)) == STEPS
