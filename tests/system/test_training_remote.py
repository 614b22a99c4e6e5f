"""Training on shards behind http is training on the same shards beside it, in bounded room."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from soar_mega.data.encoded.run import EncodeProcess, EncodeSettings, encode
from soar_mega.data.prepare.run import prepare
from soar_mega.data.shards import cache as cache_module
from soar_mega.data.shards.cache import ShardCache
from soar_mega.data.shards.index import build_index
from soar_mega.training.step import Stepper
from tests.remote_shards import ShardServer, shard_server
from tests.runs import Tiny, assert_nothing_written, command, metrics, train
from tests.training_data import SIDE, keys_of
from tests.unit.decode_cases import encoded, photo

SHARDS, SAMPLES = 6, 4  # of each
STEPS = 18  # of 2 samples: one epoch and a half
SETTINGS = EncodeSettings(resolution=64, max_sequence_length=16, samples_per_shard=20, dtype="fp32")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with their indexes."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "photos").mkdir()
    for number in range(SHARDS * SAMPLES):
        picture = encoded(photo(SIDE, SIDE, number), "JPEG")
        (folder / "photos" / f"{number:02d}.jpg").write_bytes(picture)
        (folder / "photos" / f"{number:02d}.txt").write_text(f"caption {number}")
    prepare([str(folder / "photos")], folder / "shards", samples_per_shard=SAMPLES)
    return folder / "shards"


@pytest.fixture
def server(local: Path) -> Iterator[ShardServer]:
    with shard_server() as server:
        server.files |= {f"/{path.name}": path.read_bytes() for path in local.iterdir()}
        yield server


def overrides(*more: str) -> list[str]:
    return [
        "data.shuffle_shards=1",
        "data.prefetch_steps=1",
        "train.global_batch_size=2",
        f"train.max_train_steps={STEPS}",
        "logging.sample_ids=true",
        *more,
    ]


def remote(server: ShardServer) -> str:
    return f"data.shards={server.url('/train-{000000..%06d}.tar')}" % (SHARDS - 1)


def test_a_cache_smaller_than_the_set(
    tiny: Tiny,
    local: Path,
    server: ShardServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, run = tmp_path / "cache", Stepper.run
    limit = sum(sorted(path.stat().st_size for path in local.glob("*.tar"))[-3:])
    assert limit < sum(path.stat().st_size for path in local.glob("*.tar"))
    sizes = []

    def looking(self: Stepper, *arguments: Any) -> dict[str, float]:
        with ShardCache(str(cache), 0)._alone():  # nobody makes room meanwhile
            names = [name for name in os.listdir(cache) if name != "soar.lock"]
            sizes.append(sum(os.stat(cache / name).st_size for name in names))
        return run(self, *arguments)

    train(tiny.config("pretrain", tmp_path / "local", *overrides(f"data.shards={local}/*.tar")))
    room = (f"data.cache_dir={cache}", f"data.cache_gb={limit / 1e9}")
    monkeypatch.setattr(Stepper, "run", looking)
    monkeypatch.setattr(cache_module, "_FRESH_NS", 0)  # an epoch takes less than a second here
    train(tiny.config("pretrain", tmp_path / "remote", *overrides(remote(server), *room)))
    assert keys_of(tmp_path / "remote") == keys_of(tmp_path / "local")
    assert metrics(tmp_path / "remote") == metrics(tmp_path / "local")
    assert metrics(tmp_path / "remote")[-1]["data/bad_samples"] == 0
    assert len(sizes) == STEPS and 0 < max(sizes) <= limit
    # Once in the whole epoch, and at most once in the half one and what is fetched ahead; a late
    # thread may fetch one more.
    gets = Counter({path: n for path, n in server.gets.items() if path.endswith(".tar")})
    assert len(gets) == SHARDS and gets.total() <= 14


def test_without_a_cache_it_is_refused(
    tiny: Tiny, server: ShardServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.arguments("pretrain", tmp_path / "run", *overrides(remote(server)))
    assert command(arguments) == 78
    message = capsys.readouterr().err
    for word in ("train-000000.tar", "data.cache_dir is not set", "Set it to a folder"):
        assert word in message
    # Room for one shard, where one is in use and the next is fetched.
    size = max(len(data) for path, data in server.files.items() if path.endswith(".tar"))
    room = (f"data.cache_dir={tmp_path / 'cache'}", f"data.cache_gb={size / 1e9}")
    assert command([*arguments, *room]) == 78
    message = capsys.readouterr().err
    for word in (f"data.cache_gb allows {size} bytes", "data.shuffle_shards = 1", "at least"):
        assert word in message
    assert_nothing_written(tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_encoded_shards_and_validation_behind_http(
    tiny: Tiny, local: Path, server: ShardServer, tmp_path: Path
) -> None:
    """Validation shards use the same cache."""
    index = build_index(f"{local}/*.tar")
    encode(index, tiny.pretrained, tmp_path / "set", SETTINGS, EncodeProcess())
    for path in (tmp_path / "set").iterdir():
        server.files[f"/set/{path.name}"] = path.read_bytes()
    tars = sorted((tmp_path / "set").glob("*.tar"))
    assert len(tars) == 2
    one = ("train.max_train_steps=1", "validation.validation_steps=1", "validation.num_samples=3")
    here = [f"data.shards={tmp_path}/set/*.tar", f"validation.shards={local}/*.tar"]
    there = [
        f"data.shards={server.url('/set/encoded-{000000..000001}.tar')}",
        f"validation.shards={server.url('/train-000000.tar')}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    train(tiny.config("pretrain", tmp_path / "here", *overrides(*one, *here)))
    train(tiny.config("pretrain", tmp_path / "there", *overrides(*one, *there)))
    assert metrics(tmp_path / "there") == metrics(tmp_path / "here")
    assert "val/loss" in metrics(tmp_path / "there")[0]
    assert server.gets["/train-000000.tar"] == 1
