"""What can be known of the Dockerfile without Docker: its sources, its base, what pip is asked."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soar_mega.install.requirements import (
    constraints,
    installed_versions,
    is_provided,
    moved,
    name_of,
    needed,
)

ROOT = Path(__file__).resolve().parents[2]
PROTECTED = {"torch", "apex", "transformer", "dali", "nvidia", "triton"}


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of the Dockerfile, continued lines joined as Docker joins them."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(keyword, rest) for keyword, _, rest in pairs]


def runs() -> list[str]:
    return [rest for keyword, rest in instructions() if keyword == "RUN"]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file out; the last line that fits it or a parent wins."""
    out = False
    parts = path.split("/")
    parents = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.lstrip("!")
        anywhere = pattern.startswith("**/")
        names = parts if anywhere else parents
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            out = not line.startswith("!")
    return out


def in_git() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_what_is_copied_is_in_git_and_not_ignored() -> None:
    files = in_git()
    sources = [
        s for keyword, rest in instructions() if keyword == "COPY" for s in rest.split()[:-1]
    ]
    assert len(sources) > 10
    for source in sources:
        below = [f for f in files if f == source or f.startswith(source + "/")]
        assert below, f"COPY {source}: git has no such file"
        lost = [f for f in below if ignored(f)]
        assert not lost, f"COPY {source}: .dockerignore leaves out {lost[:3]}"


def test_nothing_private_gets_into_an_image() -> None:
    for name in (".git/config", ".venv/bin/python", "slurm/cluster.env", "runs/a/env.json", ".env"):
        assert ignored(name), name
    assert ignored("soar_mega/data/__pycache__/plan.cpython-312.pyc")
    assert not ignored("slurm/cluster.env.example")


def test_the_base_is_pinned_by_its_tag() -> None:
    tags = [rest for keyword, rest in instructions() if keyword == "ARG" and "BASE_TAG" in rest]
    bases = [rest for keyword, rest in instructions() if keyword == "FROM"]
    assert bases == ["nvcr.io/nvidia/pytorch:${BASE_TAG}"]
    assert len(tags) == 1 and re.fullmatch(r"BASE_TAG=\d\d\.\d\d-py3", tags[0])
    text = (ROOT / "Dockerfile").read_text()
    assert "latest" not in text and not re.search(r"(?i)token *=|password|secret|/root", text)


def test_every_pip_call_is_bound() -> None:
    calls = [part for run in runs() for part in re.split(r";|&&", run) if "pip install" in part]
    assert len(calls) == 2
    for call in calls:
        assert "--no-deps" in call.split() or "-c" in call.split(), call
        assert "-u PIP_CONSTRAINT" in call, "NVIDIA's list would be in force: " + call


def test_run_lines_are_bash() -> None:
    for run in runs():
        subprocess.run(["bash", "-n"], input=run, text=True, check=True)


def test_hadolint() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    subprocess.run([program, "--failure-threshold", "warning", ROOT / "Dockerfile"], check=True)


# --- what the image's pip is asked for ----------------------------------------------------------

# Stands in for python: torch's version is what a file says, pip notes what it was told, and with
# MOVES may change torch; anything else is the real one.
FAKE = """#!/usr/bin/env bash
case "$*" in
  *"import torch"*) cat "$STATE/torch" ;;
  *"-m pip"*)
    printf '%s\\n' "$@" >"$STATE/pip"
    env >"$STATE/env"
    while (($#)); do
      case "$1" in
        -c) cp "$2" "$STATE/constraints" ;;
        -r) cp "$2" "$STATE/requirements" ;;
      esac
      shift
    done
    if [[ -n "${MOVES:-}" ]]; then echo "$MOVES" >"$STATE/torch"; fi ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


def build(state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The RUN that installs dependencies, on what was copied before, with a python that records."""
    lines = instructions()
    at = next(n for n, (keyword, rest) in enumerate(lines) if keyword == "RUN")
    run, folder = lines[at][1], state / "image"
    for sources in (rest.split() for keyword, rest in lines[:at] if keyword == "COPY"):
        target = folder / sources.pop()
        target.mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copy(ROOT / source, target)
    (state / "python").write_text(FAKE)
    (state / "python").chmod(0o755)
    (state / "torch").write_text("2.13.0a0+8145d630e8.nv26.06\n")
    extras = next(rest for keyword, rest in instructions() if rest.startswith("EXTRAS="))
    names = {"STATE": str(state), "REAL_PYTHON": sys.executable, "TMPDIR": str(state)}
    names |= {"PATH": f"{state}:{os.environ['PATH']}", "PIP_CONSTRAINT": "/etc/pip/constraint.txt"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", run],
        cwd=folder,
        env={**os.environ, **names, "EXTRAS": extras.split('"')[1], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_pip_is_never_asked_for_what_the_image_brings(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    asked = {name_of(line) for line in (tmp_path / "requirements").read_text().splitlines()}
    assert {"diffusers", "transformers", "pydantic", "webdataset", "pyarrow", "wandb"} <= asked
    assert not [name for name in asked if PROTECTED & set(name.split("-"))]
    assert not [word for word in (tmp_path / "pip").read_text().split() if "torch" in word]
    pins = (tmp_path / "constraints").read_text().splitlines()
    assert f"torch=={installed_versions()['torch']}" in pins
    assert "PIP_CONSTRAINT=" not in (tmp_path / "env").read_text()
    assert not list(tmp_path.glob("tmp.*"))


def test_a_build_that_changes_torch_fails(tmp_path: Path) -> None:
    done = build(tmp_path, MOVES="2.13.0")
    assert done.returncode == 1
    assert "torch was 2.13.0a0+8145d630e8.nv26.06, is 2.13.0" in done.stderr


# --- tools/image_requirements.py ----------------------------------------------------------------


def test_the_extras_that_an_image_has_add_nothing() -> None:
    pyproject = ROOT / "pyproject.toml"
    assert needed(pyproject, ["gpu", "dali"]) == needed(pyproject)
    demo = {name_of(line) for line in needed(pyproject, ["demo"])}
    assert demo - {name_of(line) for line in needed(pyproject)} == {"matplotlib", "scikit-learn"}
    with pytest.raises(ValueError, match="extra 'gpus' must be one of dali, demo"):
        needed(pyproject, ["gpus"])


@pytest.mark.parametrize(
    ("name", "provided"),
    [
        ("torch", True),
        ("Transformer_Engine.torch", True),
        ("nvidia-dali-cuda130", True),
        ("apex", True),
        ("cuda-bindings", True),
        ("transformers", False),
        ("torchmetrics", False),
        ("numpy", False),
    ],
)
def test_what_an_image_brings(name: str, provided: bool) -> None:
    assert is_provided(name) is provided


def test_constraints_keep_the_images_and_pin_what_is_new(tmp_path: Path) -> None:
    tested = tmp_path / "constraints.txt"
    tested.write_text(
        "# tested\ntorch==2.13.0\nnumpy==2.4.6\ndiffusers==0.42.1\npydantic==2.14.3\n"
    )
    image = {
        "torch": "2.13.0a0+8145d630e8.nv26.6.1",
        "numpy": "2.1.0",
        "pydantic": "2.12.0",
        "apex": "0.1",
    }
    pins = constraints(tested, image)
    assert pins == [
        "apex==0.1",
        "numpy==2.1.0",
        "torch==2.13.0a0+8145d630e8.nv26.6.1",
        "diffusers==0.42.1",
    ]
    assert moved(pins, {**image, "diffusers": "1", "pydantic": "2.14.3"}) == []
    assert moved(pins, {**image, "torch": "2.13.0", "numpy": "2.4.6"}) == [
        "numpy was 2.1.0, is 2.4.6",
        "torch was 2.13.0a0+8145d630e8.nv26.6.1, is 2.13.0",
    ]
    assert moved(["apex==0.1"], {}) == ["apex was 0.1, is gone"]
