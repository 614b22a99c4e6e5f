"""What pyproject.toml needs besides torch and NVIDIA's packages, where those are there already.

Images that bring a torch of their own (NVIDIA's, a cluster's) must keep it: its build fits the
CUDA libraries, Transformer Engine and apex beside it, and pip could only get another one. So these
names XX
"""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS = "soar-mega"
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

# Brought by the image, as normalised names.
_PROVIDED = re.compile(
    r"(torch|torchvision|torchaudio|torch-tensorrt|triton|pytorch-triton|apex|flash-attn"
    r"|transformer-engine(-.*)?|tensorrt(-.*)?|nvidia-.*|cuda-.*)"
)
# pip may ask for it, but the image's extensions are compiled against the one that is there.
_KEPT = ("numpy",)
_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?")


def normalised(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """The normalised name in a requirement such as ``Pillow>=10``.

    Raises:
        ValueError: It starts with no name.
    """
    found = _NAME.match(requirement)
    if found is None:
        raise ValueError(f"requirement {requirement!r} must start with a distribution's name")
    return normalised(found[1])


def is_provided(name: str) -> bool:
    """Whether an image with torch brings this distribution itself."""
    return _PROVIDED.fullmatch(normalised(name)) is not None


def needed(pyproject: Path, extras: Sequence[str] = ()) -> list[str]:
    """Requirements of the project and some of its extras, without those that are provided.

    Args:
        pyproject: The project's ``pyproject.toml``.
        extras: Names of ``optional-dependencies``; those that they name in turn are followed.

    Raises:
        ValueError: There is no such extra.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    offered: dict[str, list[str]] = project.get("optional-dependencies", {})
    for extra in extras:
        if extra not in offered:
            raise ValueError(
                f"extra {extra!r} must be one of {', '.join(sorted(offered))} ({pyproject})"
            )
    own = normalised(project["name"])

    def followed(requirements: Iterable[str]) -> Iterator[str]:
        for requirement in requirements:
            found = _NAME.match(requirement)
            if name_of(requirement) != own:
                yield requirement
            elif found is not None and found[2]:
                for extra in found[2].split(","):
                    yield from followed(offered[extra.strip()])

    wanted = [*project["dependencies"], *(one for extra in extras for one in offered[extra])]
    return [one for one in dict.fromkeys(followed(wanted)) if not is_provided(name_of(one))]


def version_range(name: str) -> str | None:
    """What the project asks of one of its dependencies, as ``>=2.11,<2.14``.

    None where nobody knows: this is neither a checkout nor an installed distribution, or the
    project does not depend on it.
    """
    project: dict[str, Any] = {}
    if PYPROJECT.is_file():  # beside installed packages it would be somebody else's
        project = tomllib.loads(PYPROJECT.read_text()).get("project", {})
    if project.get("name") == _OURS:
        requirements: list[str] = project["dependencies"]
    else:
        try:
            requirements = importlib.metadata.requires(_OURS) or []
        except importlib.metadata.PackageNotFoundError:
            return None
    for requirement in requirements:
        if name_of(requirement) == normalised(name) and "extra ==" not in requirement:
            found = _NAME.match(requirement)
            return requirement[found.end() :].partition(";")[0].strip() if found else None
    return None


def within(version: str, specifiers: str) -> bool:
    """Whether a version is in a range of whole releases.

    NVIDIA builds torch from commits between releases and calls it ``2.11.0a0+a6c236b9fd.nv26.03``.
    To PEP 440, and so to pip, that is older than 2.11; here it counts as the 2.11 it becomes. A
    version that is no PEP 440 version is in no range.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(version).base_version
    except InvalidVersion:
        return False
    return SpecifierSet(specifiers).contains(release)


def installed_versions() -> dict[str, str]:
    """Normalised name and version of every distribution of this Python.

    torch's own ``__version__`` may differ from it: of one NVIDIA build it ends in ``nv26.08``, the
    distribution's in ``nv26.8`` and a build number. pip compares the distribution's.
    """
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions():
        name = one.metadata["Name"]
        if name:  # half-removed packages have none
            found.setdefault(normalised(name), one.version)
    return found


def constraints(tested: Path, installed: Mapping[str, str]) -> list[str]:
    """Lines for ``pip install -c``: what is provided stays, what is new is as it was tested.

    Of what is there besides, nothing is said: pip leaves it alone where it is new enough, and can
    get a newer one where not.

    Args:
        tested: The project's ``constraints.txt``.
        installed: See ``installed_versions``.
    """
    stays = {n: v for n, v in installed.items() if is_provided(n) or n in _KEPT}
    lines = [f"{name}=={version}" for name, version in sorted(stays.items())]
    for line in tested.read_text().splitlines():
        pin = line.partition("#")[0].strip()
        if pin and not is_provided(name_of(pin)) and name_of(pin) not in installed:
            lines.append(pin)
    return lines


def moved(lines: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """What no longer is as ``constraints`` said of the provided, in words; empty: all is."""
    wrong = []
    for line in lines:
        name, _, version = line.strip().partition("==")
        if (is_provided(name) or name in _KEPT) and installed.get(name) != version:
            wrong.append(f"{name} was {version}, is {installed.get(name, 'gone')}")
    return wrong
