"""Where scorers find their weights, and what a missing or damaged one is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from soar_mega.evaluation.scorers.make import SCORERS, find_weights, make_scorer, needed_weights
from soar_mega.evaluation.scorers.weights import CLIP_L, ScorerError
from tests.fake_hub import COMMIT, NAME, FakeHub
from tests.tiny_scorers import clip_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [name for name in SCORERS if needed_weights(name)])
def test_missing_weights_say_what_to_download_and_where_to(name: str, tmp_path: Path) -> None:
    first = needed_weights(name)[0]
    with pytest.raises(ScorerError) as caught:
        make_scorer(name, tmp_path)
    told = str(caught.value)
    assert f"the scorer {name} needs {first.name}" in told
    assert f"{tmp_path / first.name} does not exist" in told
    assert f"hf download {first.repository} --revision COMMIT" in told
    assert f"--local-dir {tmp_path / first.name}" in told
    assert f"{first.repository}@COMMIT" in told
    assert f"https://huggingface.co/{first.repository}/commits/main" in told


def test_a_file_outside_the_hub_is_told_by_its_address(tmp_path: Path) -> None:
    clip_folder(tmp_path / CLIP_L.name)
    with pytest.raises(ScorerError, match=r"Download https://github\.com/\S+ava1-l14-linearMSE"):
        find_weights("aesthetic", tmp_path)


def test_a_folder_that_lacks_files_names_them(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ScorerError, match=r"lacks \*\.safetensors, tokenizer\.json"):
        find_weights("clipscore", {CLIP_L.name: tmp_path})


def test_locations_by_name(tmp_path: Path) -> None:
    clip_folder(tmp_path / "mine")
    others = {CLIP_L.name: tmp_path / "mine", "HPSv2": "somewhere"}
    assert find_weights("clipscore", others) == {CLIP_L.name: tmp_path / "mine"}
    file = {CLIP_L.name: tmp_path / "mine" / "model.safetensors"}
    assert find_weights("clipscore", file) == {CLIP_L.name: tmp_path / "mine"}
    with pytest.raises(ScorerError, match=r"needs clip-vit-large-patch14, and its location"):
        find_weights("clipscore", {"HPSv2": tmp_path})
    with pytest.raises(ScorerError, match=r"commit is missing: add @COMMIT"):
        find_weights("clipscore", {CLIP_L.name: "openai/clip-vit-large-patch14"})


def test_tensors_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScorerError, match=r"lacks 1 tensors of CLIPModel, such as visual_proj"):
        make_scorer("clipscore", {CLIP_L.name: tmp_path})


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_name_the_folder(tmp_path: Path, file: str) -> None:
    clip_folder(tmp_path)
    (tmp_path / file).write_bytes(b"\x10 not this")
    with pytest.raises(ScorerError, match=rf"{tmp_path} cannot be read as \w+: "):
        make_scorer("clipscore", {CLIP_L.name: tmp_path})


def test_an_unknown_scorer_names_the_nearest() -> None:
    with pytest.raises(ScorerError, match=r"no scorer 'clip_score': did you mean clipscore\?"):
        make_scorer("clip_score", ".")


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_says_who_defined_it(name: str) -> None:
    for weights in needed_weights(name):
        assert weights.terms
        assert weights.needs
        assert bool(weights.repository) is not bool(weights.url)


def ask_the_hub(hub: FakeHub, home: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "from soar_mega.evaluation.scorers.make import find_weights\n"
        f"print(find_weights('clipscore', {{'{CLIP_L.name}': '{NAME}@{COMMIT}'}}))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "HF_ENDPOINT": hub.address, "HF_HOME": str(home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_pinned_commit_is_downloaded_without_what_is_not_needed(tmp_path: Path) -> None:
    clip_folder(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"twice as big")
    with FakeHub(tmp_path / "model") as hub:
        done = ask_the_hub(hub, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert COMMIT in done.stdout
        assert hub.asked("model.safetensors")
        assert not hub.asked("pytorch_model.bin")
        (tmp_path / "model" / "tokenizer.json").unlink()
        done = ask_the_hub(hub, tmp_path / "other_home")
    assert done.returncode != 0
    assert "this commit lacks some of config.json, *.safetensors" in done.stderr
