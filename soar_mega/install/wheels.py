"""Wheels for a GPU machine without internet: what to download, which to install, what then works.

The machine has a torch of its own, which stays, and some of the rest. Nothing but Python and pip is
needed at import; choosing needs ``packaging``.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

from soar_mega.install.requirements import PYPROJECT, is_provided, needed, normalised

# What runs and builds Transformer Engine besides torch and itself; the tests' pytest.
_BESIDES = (
    "einops",
    "onnx",
    "onnxscript",
    "importlib-metadata",
    "setuptools>=77",
    "wheel",
    "ninja",
)
_TOOLS = ("pytest>=8", "hypothesis>=6.100")
# Their dependencies would bring a torch, or gigabytes that we do not use.
_ALONE = ("transformer-engine", "nvdlfw-inspect", "nvidia-cudnn-frontend")
_SOURCE = "transformer-engine-torch"
_IMPORTS = (
    "torch",
    "diffusers",
    "transformers",
    "pydantic",
    "webdataset",
    "nvidia.dali",
    "transformer_engine.pytorch",
    "soar_mega.train",
)
_GLIBC = ("2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
# Enough of torch for the metadata of an extension that is compiled elsewhere.
_STAND_IN = {
    "torch/__init__.py": "__version__ = '0'\n\n\nclass version:\n    cuda = '{cuda}'\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": (
        "from setuptools import Extension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension  # noqa: F401\n\n\n"
        "def CppExtension(name, sources, **_):\n    return Extension(name, sources)\n\n\n"
        "CUDAExtension = CppExtension\n"
    ),
}

Run = Callable[[Sequence[str], Mapping[str, str]], None]


class WheelsError(Exception):
    """Wheels cannot be had, installed or compiled; the message says which and why."""


def run_pip(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """``pip`` of this Python, with these variables besides its own.

    Raises:
        WheelsError: It fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise WheelsError(f"pip {' '.join(arguments)} failed with {done.returncode}; it said why")


# --- packing ------------------------------------------------------------------------------------


def roots(cuda: str) -> list[str]:
    """Requirements of a machine with torch: the project's, DALI, Transformer Engine's, tools."""
    dali = f"nvidia-dali-cuda{cuda.split('.')[0]}0"
    return [*needed(PYPROJECT), dali, *_BESIDES, *_TOOLS]


def download(out: Path, *, python: str, cuda: str, tested: Path, run: Run = run_pip) -> list[Path]:
    """Download what a Linux x86-64 machine needs besides torch and torch's CUDA packages.

    Args:
        out: Folder of the files; made if missing.
        python: Version there, as ``3.12``.
        cuda: Of its torch, as ``13.0``.
        tested: The project's ``constraints.txt``.
        run: Runs pip.

    Raises:
        WheelsError: pip fails, or torch came along.
    """
    out.mkdir(parents=True, exist_ok=True)
    major = cuda.split(".")[0]
    target = [f"--python-version={python}", "--only-binary=:all:", "--implementation=cp"]
    target += [f"--platform=manylinux_{version}_x86_64" for version in _GLIBC]
    target += ["--platform=manylinux2014_x86_64", f"--dest={out}"]
    # Headers that torch's own packages do not always bring, all of one CUDA.
    headers = f"cuda-toolkit[cccl,crt,curand,profiler]=={cuda}.*"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pins = [one for one in tested.read_text().splitlines() if not one.startswith("torch==")]
        (folder / "constraints.txt").write_text("\n".join(pins) + "\n")
        bound = ["-c", str(folder / "constraints.txt")]
        run(["download", *target, *bound, *roots(cuda), headers], {})
        run(["download", *target, "--no-deps", *_ALONE, f"transformer-engine-cu{major}"], {})
        for name, text in _STAND_IN.items():
            path = folder / "stand_in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.format(cuda=cuda) if "{cuda}" in text else text)
        # pip runs setup.py for the metadata even of a plain download, and that imports torch; with
        # build isolation it would fetch one.
        source = ["--no-deps", "--no-build-isolation", f"--no-binary={_SOURCE}", f"--dest={out}"]
        inherited = os.environ.get("PYTHONPATH")
        paths = [str(folder / "stand_in"), *([inherited] if inherited else [])]
        run(["download", *source, _SOURCE], {"PYTHONPATH": os.pathsep.join(paths)})
    for path in out.glob("cuda_toolkit-*.whl"):
        path.unlink()  # a list of names, no more
    found = sorted(out.iterdir())
    unwanted = [p.name for p in found if normalised(p.name.split("-")[0]) in {"torch", "triton"}]
    if unwanted:
        raise WheelsError(f"{', '.join(unwanted)}: a dependency brings torch: list it in _ALONE")
    return found


# --- choosing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A version of a distribution and what it asks for."""

    version: str
    requires: tuple[str, ...]


def of_wheel(path: Path) -> tuple[str, Package]:
    """Normalised name and package of a wheel.

    Raises:
        WheelsError: It has no metadata.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            message = Parser().parsestr(archive.read(name).decode())
    except (zipfile.BadZipFile, StopIteration) as error:
        raise WheelsError(f"{path}: no wheel: {error or 'it has no METADATA'}") from error
    requires = tuple(message.get_all("Requires-Dist") or ())
    return normalised(message["Name"]), Package(message["Version"], requires)


def installed(paths: Sequence[str] | None = None) -> dict[str, Package]:
    """What is installed on ``paths``; None: on Python's own."""
    found: dict[str, Package] = {}
    for one in importlib.metadata.distributions(path=list(sys.path if paths is None else paths)):
        name = one.metadata["Name"]
        if name:
            package = Package(one.version, tuple(one.requires or ()))
            found.setdefault(normalised(name), package)
    return found


def choose(
    packed: Mapping[str, Package], there: Mapping[str, Package], wanted: Iterable[str]
) -> list[str]:
    """Which packed wheels to install, by name, so that nothing that fits is replaced.

    Chosen is what is wanted and not there or too old, then what the chosen ask for, then what is
    there and does not go with a chosen one. torch and its CUDA packages are not looked at.
    """
    from packaging.requirements import Requirement

    chosen: set[str] = set()

    def met(one: Requirement) -> bool:
        name = normalised(one.name)
        package = packed[name] if name in chosen else there.get(name)
        if package is None:
            return False
        return one.specifier.contains(package.version, prereleases=True)

    def asked(requires: Iterable[str]) -> Iterator[Requirement]:
        for text in requires:
            one = Requirement(text)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                yield one

    while True:
        before = len(chosen)
        for one in asked(wanted):
            if not met(one) and normalised(one.name) in packed:
                chosen.add(normalised(one.name))
        for name in sorted(chosen | (packed.keys() & there.keys())):
            package = packed[name] if name in chosen else there[name]
            for one in asked(package.requires):
                other = normalised(one.name)
                if met(one) or (is_provided(other) and other not in packed):
                    continue
                if other in packed and other not in chosen:
                    chosen.add(other)
                elif name in packed:
                    chosen.add(name)
        if len(chosen) == before:
            return sorted(chosen)


# --- installing ---------------------------------------------------------------------------------


def install(
    files: Sequence[Path], *, cuda: str, target: Path | None = None, run: Run = run_pip
) -> list[str]:
    """Install what is needed of the wheels; the names.

    Args:
        files: Wheels and the source of Transformer Engine's extension.
        cuda: As for ``download``.
        target: Folder instead of this Python's own; it must then be on ``PYTHONPATH``.
        run: Runs pip.

    Raises:
        WheelsError: A file is no wheel, or pip fails.
    """
    paths = {}
    packed = {}
    for path in files:
        if path.suffix == ".whl":
            name, package = of_wheel(path)
            paths[name], packed[name] = path, package
    there = {**installed(), **(installed([str(target)]) if target is not None else {})}
    # A header package counts as wanted too: what torch brings of it stays.
    wanted = [
        *roots(cuda),
        *_ALONE,
        *(n for n in packed if n.startswith(("nvidia-", "transformer-"))),
    ]
    names = choose(packed, there, wanted)
    if names:
        where = [f"--target={target}", "--upgrade"] if target is not None else []
        options = ["--no-index", "--no-deps", "--break-system-packages", *where]
        run(["install", *options, *(str(paths[name]) for name in names)], {})
    return names


def compile_extension(
    files: Sequence[Path], *, jobs: int, target: Path | None = None, run: Run = run_pip
) -> bool:
    """Compile and install transformer_engine_torch against the torch that is here.

    False: the files have none, or it is there in that version already.

    Raises:
        WheelsError: It does not compile.
    """
    sources = [path for path in files if normalised(path.name).startswith(_SOURCE)]
    if not sources:
        return False
    search = [*([str(target)] if target is not None else []), *sys.path]
    version = sources[0].name.removesuffix(".tar.gz").rpartition("-")[2]
    there = installed(search).get(_SOURCE)
    if there is not None and there.version == version:
        return False
    includes, libraries = [], []
    for root in dict.fromkeys(search):
        includes += sorted(map(str, Path(root).glob("nvidia/*/include")))
        libraries += sorted(map(str, Path(root).glob("nvidia/*/lib")))
    environment = {
        "CPATH": os.pathsep.join([*includes, *filter(None, [os.environ.get("CPATH")])]),
        "LIBRARY_PATH": os.pathsep.join(
            [*libraries, *filter(None, [os.environ.get("LIBRARY_PATH")])]
        ),
        "MAX_JOBS": str(jobs),
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",  # it would look for a wheel on the internet first
        "NVTE_WITH_NCCL_EP": "0",  # expert parallelism, which needs more of NCCL's headers
    }
    if target is not None:
        inherited = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(target), *filter(None, [inherited])])
    where = [f"--target={target}", "--upgrade"] if target is not None else []
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--break-system-packages", *where]
    run(["install", *options, str(sources[0])], environment)
    return True


def imports(target: Path | None = None, names: Sequence[str] = _IMPORTS) -> dict[str, str | None]:
    """Module -> None if a fresh Python imports it, else the last line of what it said."""
    environment = dict(os.environ)
    if target is not None:
        parts = [str(target), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(parts)
    found: dict[str, str | None] = {}
    for name in names:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        found[name] = None if done.returncode == 0 else said[-1]
    return found
