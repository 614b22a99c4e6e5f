"""Models named by hub id: one download a machine, a pinned commit, offline, plain refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soar_mega import hub
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.exporter import export
from soar_mega.config import ConfigError
from soar_mega.training.plan import make_plan
from soar_mega.training.plan_times import gpu_named
from tests.fake_hub import COMMIT, NAME, FakeHub
from tests.runs import REPOSITORY, Tiny, checkpoint, trainer_record

SOURCE = f"{NAME}@{COMMIT}"
TOKEN = "hf_" + "s3cr3t" * 5
# The library waits between its tries; a test need not.
RESOLVE = (
    "import sys, time; time.sleep = lambda seconds: None\n"
    "import filelock, huggingface_hub; huggingface_hub.snapshot_download\n"
    "print('ready', flush=True); sys.stdin.readline()\n"
    "from soar_mega import hub\n"
    "try: print(hub.resolve(sys.argv[1], setting='model.pretrained'))\n"
    "except hub.HubError as error: sys.exit(f'error: {error}')"
)


def environment(home: Path, address: str, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    paths = {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(home), "HF_ENDPOINT": address}
    return {**kept, **paths, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN, **more}


def resolve(
    home: Path, address: str, processes: int = 1, source: str = SOURCE, **more: str
) -> list[tuple[str, str]]:
    """(output, error) of each of several processes that want the model at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RESOLVE, source],
            env=environment(home, address, **more),
            cwd=home.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=120) for process in started]


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as the hub has them: with files that training does not need."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(tiny.pretrained, folder)
    unneeded = ["all.safetensors", "text_encoders/clip.safetensors", "README.md"]
    unneeded += ["text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"]
    for name in unneeded:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture(scope="module")
def home(model: Path) -> tuple[Path, FakeHub, list[tuple[str, str]]]:
    """A cache that four processes filled, the hub (gone by now), and what they said."""
    home = model.parent / "home"
    with FakeHub(model) as fake:
        said = resolve(home, fake.address, processes=4)
    return home, fake, said


@pytest.fixture
def cache(
    home: tuple[Path, FakeHub, list[tuple[str, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A copy of the filled cache, in use in this process, and no network."""
    from huggingface_hub import constants

    copy = tmp_path / "hub"
    shutil.copytree(home[0] / "hub", copy, symlinks=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copy))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return copy


def snapshot(cache: Path) -> Path:
    return cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT


def test_four_processes_download_once_and_what_is_needed_only(
    home: tuple[Path, FakeHub, list[tuple[str, str]]], model: Path
) -> None:
    folder, fake, said = home
    assert [out.strip() for out, _ in said] == [str(snapshot(folder / "hub"))] * 4
    assert sum("downloading" in err for _, err in said) == 1
    files = {line: n for line, n in fake.requests.items() if line.startswith("GET /some")}
    assert set(files.values()) == {1}
    assert fake.asked("GET /somebody/tiny-sd3/resolve") == len(files)
    assert fake.asked("transformer/diffusion_pytorch_model") >= 1
    assert fake.asked("/tree/") == 1
    assert not [line for line in fake.requests if COMMIT not in line]
    left_out = ["all.safetensors", "text_encoders", "fp16", ".bin", "README"]
    assert not [name for name in left_out if fake.asked(name)]


def test_a_filled_cache_asks_nobody(
    home: tuple[Path, FakeHub, list[tuple[str, str]]], model: Path
) -> None:
    with FakeHub(model) as fake:
        for more in ({}, {"HF_HUB_OFFLINE": "1"}):
            ((out, _),) = resolve(home[0], fake.address, **more)
            assert out.strip() == str(snapshot(home[0] / "hub"))
    assert not fake.requests


def test_offline_without_the_model_says_how_to_get_it(tmp_path: Path) -> None:
    ((_, error),) = resolve(tmp_path / "home", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert f"model.pretrained = '{NAME}' (commit {COMMIT})" in error
    assert "HF_HUB_OFFLINE" in error
    assert f"hf download {NAME} --revision {COMMIT}" in error


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((403, "GatedRepo"), ["gated", f"https://huggingface.co/{NAME}", "hf auth login"]),
        ((404, "RepoNotFound"), ["no such model", "HF_TOKEN"]),
        ((404, "RevisionNotFound"), ["no such commit", "model.revision"]),
        ((429, ""), ["429", "HF_HUB_OFFLINE=1", f"hf download {NAME}"]),
    ],
    ids=["gated", "unknown", "commit", "busy"],
)
def test_what_the_hub_refuses_is_told_plainly_and_asked_once(
    refusal: tuple[int, str], words: list[str], model: Path, tmp_path: Path
) -> None:
    with FakeHub(model, refuses=refusal) as fake:
        said = resolve(tmp_path / "home", fake.address, processes=2)
    for out, error in said:
        last = error[error.index("error: ") :]
        assert not out
        assert not [word for word in [COMMIT, *words] if word not in last]
        assert "Traceback" not in error
        assert "s3cr3t" not in error
    assert any("s3cr3t" in token for token in fake.tokens)
    assert sum("downloading" in error for _, error in said) == 1


def test_no_network(tmp_path: Path) -> None:
    ((_, error),) = resolve(tmp_path / "home", "http://127.0.0.1:9")
    assert "the download failed (" in error
    assert f"hf download {NAME} --revision {COMMIT}" in error
    assert "Traceback" not in error


def test_a_commit_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "transformer" / "config.json").write_text("{}")
    with FakeHub(tmp_path / "model") as fake:
        ((_, error),) = resolve(tmp_path / "home", fake.address)
    assert "no whole diffusers SD3 pipeline" in error


@pytest.mark.parametrize("listing", [True, False], ids=["listing", "no listing"])
@pytest.mark.parametrize(
    "file", ["model_index.json", "vae/config.json", "text_encoder/*.safetensors", "tokenizer/*"]
)
def test_a_half_filled_cache_does_not_count(cache: Path, file: str, listing: bool) -> None:
    assert hub.cached(SOURCE) == snapshot(cache)
    if not listing:  # as older versions of the library leave it
        shutil.rmtree(snapshot(cache).parents[1] / "trees")
        from huggingface_hub import _tree_cache

        _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    for path in snapshot(cache).glob(file):
        path.unlink()
    assert hub.cached(SOURCE) is None
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE"):
        hub.resolve(SOURCE, setting="model.pretrained")


def test_a_missing_shard_is_noticed(cache: Path) -> None:
    folder = snapshot(cache) / "vae"
    weights = next(folder.glob("*.safetensors"))
    index = folder / f"{weights.name}.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{weights.name}", "b": "absent.safetensors"}}}}')
    assert hub.cached(SOURCE) is None


def test_what_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.parse(SOURCE) == (NAME, COMMIT)
    for text in (NAME, f"{NAME}@main", f"/{SOURCE}", f"a/{SOURCE}", f"./b@{COMMIT}", "/data/sd35"):
        assert hub.parse(text) is None
    for path in ("/data/absent", "./absent", "runs/tiny/absent", "absent"):
        assert hub.resolve(path, setting="model.pretrained") == Path(path)
    with pytest.raises(hub.HubError, match=r"no such folder.*set model\.revision"):
        hub.resolve(NAME, setting="model.pretrained")
    with pytest.raises(hub.HubError, match=r"--base.*@COMMIT"):
        hub.resolve(NAME, setting="--base")
    (tmp_path / NAME).mkdir(parents=True)
    assert hub.resolve(NAME, setting="model.pretrained") == Path(NAME)
    with pytest.raises(hub.HubError, match="is a folder here"):
        hub.resolve(SOURCE, setting="model.pretrained")
    assert hub.recorded(SOURCE) == SOURCE
    assert hub.recorded(NAME) == str(tmp_path / NAME)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        (NAME, "main", "40 hex digits"),
        (NAME, COMMIT[:7], "40 hex digits"),
        ("/data/sd35", COMMIT, "no hub name"),
    ],
)
def test_a_revision_is_a_commit_of_a_hub_name(
    tiny: Tiny, tmp_path: Path, name: str, revision: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        tiny.config("sft", tmp_path, f"model.pretrained={name}", f"model.revision='{revision}'")
    assert "model.revision" in str(caught.value)


def test_a_plan_needs_no_weights(
    cache: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in snapshot(cache).rglob("*.safetensors"):
        file.unlink()
    settings = (f"model.pretrained={NAME}", f"model.revision='{COMMIT}'")
    plan = make_plan(tiny.config("sft", tmp_path, *settings), 1, gpu_named("H200"))
    assert plan.architecture.num_layers == 3


def test_a_run_from_a_hub_model_records_name_and_commit_and_exports(
    home: tuple[Path, FakeHub, list[tuple[str, str]]],
    cache: Path,
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    arguments = tiny.arguments(
        "sft",
        tmp_path / "run",
        f"model.pretrained={NAME}",
        f"model.revision='{COMMIT}'",
        "train.max_train_steps=1",
    )
    done = subprocess.run(
        [sys.executable, "-m", "soar_mega.train", *arguments],
        env=environment(home[0], "http://127.0.0.1:9", HF_HUB_OFFLINE="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = checkpoint(tmp_path / "run", 1)
    record = trainer_record(path)
    assert record["lineage"]["parents"] == [{"pretrained": SOURCE}]
    assert record["model"]["pretrained"] == SOURCE
    out = export(path, tmp_path / "out")
    assert (out / "vae" / "config.json").read_bytes() == (
        tiny.pretrained / "vae" / "config.json"
    ).read_bytes()
    assert SOURCE in (out / "README.md").read_text()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        export(path, tmp_path / "other", base=f"somebody/else@{COMMIT}")


def test_init_from_a_hub_name_says_where_hub_models_are_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soar_mega.checkpoint.weight_sources import find_weights

    monkeypatch.chdir(tmp_path)
    for source in (NAME, SOURCE):
        with pytest.raises(CheckpointError, match=r"model\.pretrained"):
            find_weights(source)
