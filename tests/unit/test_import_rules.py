"""Who may import whom, and what may be a dependency: read from the source, nothing is run."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "soar_mega"

# Room -> rooms it may import, besides itself and the COMMON ones.
COMMON = {"rng", "passes", "hub"}
BELOW_TRAINING = {"config", "objectives", "parallel", "backends", "model", "pipeline", "data"}
BELOW_TRAINING |= {"checkpoint", "sampling"}
ALLOWED: dict[str, set[str]] = {
    "rng": set(),
    "passes": set(),
    "hub": set(),
    "config": set(),
    "objectives": set(),
    "parallel": set(),
    "backends": {"parallel"},
    "model": {"backends", "parallel"},
    "pipeline": {"model", "parallel"},
    "data": {"config", "parallel"},
    "checkpoint": {"model", "parallel"},
    "sampling": {"backends", "model", "pipeline", "parallel"},
    "training": BELOW_TRAINING | {"telemetry", "launch", "evaluation"},
    "telemetry": {"config"},
    "install": set(),
    "launch": {"config", "telemetry", "install"},
    "evaluation": {"sampling", "checkpoint", "telemetry", "data", "config", "model", "parallel"},
}
ENTRY_POINTS = {"train"}
# Not installed everywhere: imported inside the function that needs them.
OPTIONAL = {"wandb", "nvidia", "transformer_engine", "apex", "pyarrow", "matplotlib"}


def imported(tree: ast.AST, package: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every module an import statement may load, relative ones resolved against ``package``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                head = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{head}.{base}" if base else head
            for alias in node.names:
                yield f"{base}.{alias.name}", node


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def violations(source: str, path: Path) -> list[str]:
    """What a file of the package imports but may not."""
    room, found = room_of(path), []
    for name, node in imported(ast.parse(source), package_of(path)):
        parts = name.split(".")
        where = f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        if parts[0] in {"tools", "tests"}:
            found.append(where)
        if room == "objectives" and name.startswith("torch.distributed"):
            found.append(where)
        if parts[0] != "soar_mega" or len(parts) == 1:
            continue
        other = parts[1]
        known = other in ALLOWED or other in ENTRY_POINTS
        if not known or room in ENTRY_POINTS or room == "__init__":
            continue  # a name of soar_mega/__init__.py, such as __version__
        if other != room and other not in ALLOWED[room] | COMMON:
            found.append(where)
    return found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(path) for path in sources()} - {"__init__"} - ENTRY_POINTS
    assert rooms <= set(ALLOWED), "add the new room to the table here and in docs/architecture.md"
    assert {"config", "telemetry", "launch"} <= rooms


def test_table_has_no_circles() -> None:
    order: list[str] = []
    rest = dict(ALLOWED)
    while rest:
        free = [room for room, others in rest.items() if others <= set(order)]
        assert free, f"circle among {sorted(rest)}"
        order += free
        rest = {room: others for room, others in rest.items() if room not in free}


def test_rooms_import_only_what_they_may() -> None:
    broken = [line for path in sources() for line in violations(path.read_text(), path)]
    assert not broken, "\n".join(broken)


def test_init_of_the_package_imports_nothing() -> None:
    assert not list(imported(ast.parse((PACKAGE / "__init__.py").read_text()), "soar_mega"))


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("objectives/soar.py", "from soar_mega.config import Config"),
        ("objectives/soar.py", "from torch import distributed"),
        ("objectives/soar.py", "import torch.distributed as dist"),
        ("parallel/mesh.py", "from soar_mega.model import stage"),
        ("parallel/mesh.py", "from .. import model"),
        ("parallel/mesh.py", "from ..model.stage import MMDiTStage"),
        ("rng.py", "from . import config"),
        ("data/loader.py", "def f():\n    import soar_mega.checkpoint.store"),
        ("model/stage.py", "import tools.demo"),
        ("evaluation/run.py", "from soar_mega.training import trainer"),
        ("evaluation/report.py", "from soar_mega.train import main"),
    ],
)
def test_the_rule_sees_what_it_should(room: str, line: str) -> None:
    assert violations(line, PACKAGE / room)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("objectives/soar.py", "from soar_mega import passes\nfrom ..rng import Purpose"),
        ("model/stage.py", "from .block import Block\nfrom soar_mega.parallel.mesh import Mesh"),
        ("launch/provenance.py", "import soar_mega\nfrom soar_mega import __version__"),
        ("train.py", "from soar_mega.training import trainer\nfrom soar_mega import telemetry"),
    ],
)
def test_the_rule_lets_through_what_it_should(room: str, line: str) -> None:
    assert not violations(line, PACKAGE / room)


def test_optional_packages_are_imported_inside_functions_only() -> None:
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            for name, _ in imported(node, package_of(path)):
                inside = isinstance(node, ast.FunctionDef | ast.ClassDef)
                assert inside or name.split(".")[0] not in OPTIONAL, f"{path}: {name}"


# --- pyproject.toml and what make installs -----------------------------------------------------


def project() -> dict[str, object]:
    loaded: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def requirements(extra: str | None = None) -> list[Requirement]:
    """Direct dependencies, or those of an extra with the extras it includes."""
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    lines = project()["dependencies"] if extra is None else extras[extra]
    assert isinstance(lines, list)
    found: list[Requirement] = []
    for requirement in map(Requirement, lines):
        inner = requirement.extras if requirement.name == "soar-mega" else ()
        found += [part for name in inner for part in requirements(name)] if inner else [requirement]
    return found


def test_torch_range_is_the_supported_one() -> None:
    (torch,) = [requirement for requirement in requirements() if requirement.name == "torch"]
    inside = ["2.11.0", "2.12.0", "2.12.1", "2.13.0", "2.13.0+cpu"]
    assert [version for version in inside if not torch.specifier.contains(version)] == []
    assert not torch.specifier.contains("2.10.0")
    assert not torch.specifier.contains("2.14.0")


def test_dependencies_are_ranges_not_pins() -> None:
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    for requirement in [*requirements(), *(r for extra in extras for r in requirements(extra))]:
        assert not any(part.operator in ("==", "===") for part in requirement.specifier)


def test_neither_the_base_nor_the_demo_installs_dali_or_wandb() -> None:
    needed = {requirement.name for requirement in requirements() + requirements("demo")}
    assert "torch" in needed
    assert "scikit-learn" in needed
    assert not {name for name in needed if "dali" in name or "wandb" in name}
    makefile = (ROOT / "Makefile").read_text()
    assert "-e '.[demo]'" in makefile
    assert "dali" not in makefile
    assert "wandb" not in makefile


def test_constraints_fit_the_ranges() -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[pin.name.lower().replace("_", "-")] = str(pin.specifier).removeprefix("==")
    assert pins["torch"] == "2.13.0"
    for requirement in requirements() + requirements("dev"):
        version = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), requirement
