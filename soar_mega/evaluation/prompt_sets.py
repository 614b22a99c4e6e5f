"""Reading prompt sets."""

from __future__ import annotations

from pathlib import Path

from soar_mega.evaluation.interface import Prompt


def read_prompts(path: Path, kind: str) -> list[Prompt]:
    """The prompts of a file, one a line.

    Raises:
        ValueError: Another kind.
    """
    if kind != "lines":
        raise ValueError(f"the prompt format {kind!r} is unknown: use lines")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Prompt(line.strip()) for line in lines if line.strip()]
