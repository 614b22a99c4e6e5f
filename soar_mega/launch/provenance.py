"""``env.json``: what a run was started with, so that it can be understood and repeated."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import soar_mega
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.telemetry.files import put_aside, write_whole

FILE_NAME = "env.json"
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "webdataset",
    "pydantic",
    "PyYAML",
    "numpy",
    "pillow",
    "tqdm",
    "scikit-learn",
    "wandb",
    "transformer-engine",
    "apex",
    "nvidia-dali-cuda130",
)

_SECRET_NAME = r"[\w.-]*(?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|credential)[\w.-]*"
_SECRET_VALUE = re.compile(
    r"\b(?:hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{12,}|sk-[\w-]{16,})"
)


def write_environment(
    run_dir: str | Path,
    process: ProcessEnvironment,
    command: Sequence[str] | None = None,
) -> Path:
    """Write ``<run_dir>/env.json``, an earlier start's being kept; only one process of a run may.

    Args:
        run_dir: Folder of the run; made if missing.
        process: Place of this process.
        command: Command line; ``sys.orig_argv`` by default. Secrets in it are not written.

    Returns:
        The file.
    """
    record = {
        "soar_mega": soar_mega.__version__,
        "git": git_state(Path(soar_mega.__file__).parents[1]),
        "command": redact(sys.orig_argv if command is None else command),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "process": asdict(process),
    }
    path = Path(run_dir) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    put_aside(path)
    write_whole(path, json.dumps(record, indent=2) + "\n")
    return path


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that matters; None: not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Revision of the checkout whose root is ``folder``, and whether it has changes.

    None where ``folder`` is no such root (an installed package, whatever repository it lies in) or
    git cannot be asked. ``revision`` is None before the first commit.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve():
        return None
    status = _git(folder, "status", "--porcelain")
    return {
        "revision": _git(folder, "rev-parse", "--verify", "HEAD"),
        "dirty": status is None or bool(status),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def redact(command: Sequence[str]) -> list[str]:
    """The command line with ``***`` in place of what looks like a secret.

    That is the value of an option whose name says so (``--token X``, ``a.api_key=X``), the
    user part of a URL, and keys of well-known shapes wherever they stand.
    """
    shown: list[str] = []
    hide_next = False
    for word in command:
        if hide_next and not word.startswith("-"):
            shown.append("***")
            hide_next = False
            continue
        hide_next = re.fullmatch(rf"--?{_SECRET_NAME}", word, re.IGNORECASE) is not None
        word = re.sub(rf"(?i)^((?:--?)?{_SECRET_NAME}=).*", r"\1***", word, flags=re.DOTALL)
        word = re.sub(r"(\w://)[^/@\s]+@", r"\1***@", word)
        shown.append(_SECRET_VALUE.sub("***", word))
    return shown
