"""Fills in ``slurm/train.sbatch``: the one template of a training job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_OPTION = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")


@dataclass(frozen=True)
class Job:
    """What a training job is to be.

    Attributes:
        home: The repository, as all nodes see it.
        arguments: Configuration and overrides.
        options: sbatch's long options without dashes; they replace the template's, or are added.
        settings: Variables of ``cluster.env`` that this job has another value of.
    """

    home: Path
    arguments: Sequence[str]
    options: Mapping[str, str]
    settings: Mapping[str, str]


def render(template: str, job: Job, problems: Sequence[str] = ()) -> str:
    """The script of a job.

    Args:
        template: Text of ``slurm/train.sbatch``.
        job: What to fill in.
        problems: Shown as comments below the options.

    Raises:
        ValueError: An option or argument with a line break, or the template lacks a line.
    """
    for text in (*job.arguments, *job.options.values(), *job.settings.values(), str(job.home)):
        if "\n" in text:
            raise ValueError(f"{text!r} has a line break, which a job script cannot hold")
    lines = template.splitlines()
    left = dict(job.options)
    last = 0
    for number, line in enumerate(lines):
        if found := _OPTION.fullmatch(line):
            last = number
            if found[1] in left:
                lines[number] = _option(found[1], left.pop(found[1]))
    notes = [f"# check failed: {line}" for text in problems for line in text.splitlines()]
    lines[last + 1 : last + 1] = [_option(*option) for option in left.items()] + notes
    words = " ".join(map(shlex.quote, job.arguments))
    settings = [f"export {name}={shlex.quote(value)}" for name, value in job.settings.items()]
    _replace(lines, "SOAR_MEGA_HOME=", [f"SOAR_MEGA_HOME={shlex.quote(str(job.home))}"])
    _replace(lines, "ARGUMENTS=", [f"ARGUMENTS=({words})", *settings])
    return "\n".join(lines) + "\n"


def _option(name: str, value: str) -> str:
    # sbatch reads a value as a shell does.
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


def _replace(lines: list[str], start: str, new: list[str]) -> None:
    for number, line in enumerate(lines):
        if line.startswith(start):
            lines[number : number + 1] = new
            return
    raise ValueError(f"the template has no line that begins with {start}")
