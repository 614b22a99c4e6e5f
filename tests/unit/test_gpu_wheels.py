"""tools/gpu_wheels.py with small wheels made here: cut, joined, chosen, installed by real pip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from soar_mega.install import wheels
from soar_mega.install.pieces import MANIFEST, PiecesError, cut, join
from soar_mega.install.wheels import (
    Package,
    WheelsError,
    choose,
    compile_extension,
    download,
    imports,
    install,
    of_wheel,
)
from tools import gpu_wheels

MIB = 2**20


def wheel(folder: Path, name: str, version: str, *requires: str, size: int = 0) -> Path:
    """A wheel of one module that knows its version; ``size`` bytes of ballast."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{name}_ballast.bin", os.urandom(size))
        archive.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata]) + "\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize("tool", ["gpu_wheels", "image_requirements"])
def test_it_runs_before_anything_is_installed(tool: str) -> None:
    """-S: without site-packages."""
    root = Path(gpu_wheels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", str(root / "tools" / f"{tool}.py"), "--help"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- pieces -------------------------------------------------------------------------------------


def test_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    made = tmp_path / "made"
    files = [
        wheel(made, "soar_small", "1.0"),
        wheel(made, "soar_large", "2.0", size=250_000),
        wheel(made, "soar_other", "3.0", size=70_000),
    ]
    (made / "empty").touch()
    out = tmp_path / "out"
    cut([*files, made / "empty"], out, 100_000)
    folders = sorted(out.iterdir())
    assert [folder.name for folder in folders] == ["01", "02", "03", "04"]
    for folder in folders:
        sizes = [path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST]
        assert sizes and sum(sizes) <= 100_000
    names = {path.name for path in out.rglob("*")}
    assert "soar_large-2.0-py3-none-any.whl.001-of-003" in names
    # Each folder arrived somewhere else, one of them twice.
    arrived = [tmp_path / "arrived" / str(n) for n in range(5)]
    for target, folder in zip(arrived, [*folders, folders[0]], strict=True):
        target.parent.mkdir(exist_ok=True)
        target.mkdir()
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    joined, wrong = join(arrived, tmp_path / "joined")
    assert not wrong
    assert {p.name: p.read_bytes() for p in joined} == {
        p.name: p.read_bytes() for p in made.iterdir()
    }


def packed(tmp_path: Path) -> Path:
    made, out = tmp_path / "made", tmp_path / "out"
    cut([wheel(made, "a", "1", size=900), wheel(made, "b", "1", size=3000)], out, 2000)
    return out


def test_a_damaged_piece_is_named_and_the_rest_can_be_had(tmp_path: Path) -> None:
    out = packed(tmp_path)
    (piece,) = out.rglob("b-1-py3-none-any.whl.002-of-*")
    data = bytearray(piece.read_bytes())
    data[5] ^= 1
    piece.write_bytes(data)
    with pytest.raises(PiecesError, match=f"damaged: {piece.parent.name}/{piece.name} "):
        join([out], tmp_path / "joined")
    joined, wrong = join([out], tmp_path / "joined", partial=True)
    assert [path.name for path in joined] == ["a-1-py3-none-any.whl"]
    assert len(wrong) == 1


def test_missing_pieces_are_named_all_of_them(tmp_path: Path) -> None:
    out = packed(tmp_path)
    gone = sorted(out.rglob("*.whl*"))[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(PiecesError) as caught:
        join([out], tmp_path / "joined")
    for path in gone:
        assert f"missing: {path.parent.name}/{path.name} (" in str(caught.value)


def test_manifests_must_be_of_one_packing(tmp_path: Path) -> None:
    out = packed(tmp_path)
    with pytest.raises(PiecesError, match="none found"):
        join([tmp_path / "made"], tmp_path / "joined")
    other = json.loads((out / "01" / MANIFEST).read_text())
    other["files"][0]["name"] = "../x"
    text = json.dumps(other)
    (out / "01" / MANIFEST).write_text(text)
    with pytest.raises(PiecesError, match="these differ"):
        join([out], tmp_path / "joined")
    for path in out.rglob(MANIFEST):
        path.write_text(text)
    with pytest.raises(PiecesError, match="must be a plain name"):
        join([out], tmp_path / "joined")
    for path in out.rglob(MANIFEST):
        path.write_text(text[:-9])
    with pytest.raises(PiecesError, match="damaged"):
        join([out], tmp_path / "joined")


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    out = packed(tmp_path)
    one = wheel(tmp_path / "c", "c", "1")
    with pytest.raises(ValueError, match="must be empty"):
        cut([one], out, 100)
    with pytest.raises(ValueError, match="piece size = 0 must be at least 1"):
        cut([one], tmp_path / "new", 0)
    with pytest.raises(ValueError, match="two files have one name"):
        cut([one, one], tmp_path / "new", 100)


# --- which wheels -------------------------------------------------------------------------------


def package(version: str, *requires: str) -> Package:
    return Package(version, requires)


def test_only_what_is_lacking_or_too_old_is_chosen() -> None:
    have = {"torch": package("2.11.0+cu130"), "numpy": package("2.1.0"), "tqdm": package("4.60")}
    offered = {"numpy": package("2.4.6"), "tqdm": package("4.70"), "pydantic": package("2.14")}
    wanted = ["numpy>=1.26", "tqdm>=4.66", "pydantic>=2.9,<3", "torch>=2.11"]
    assert choose(offered, have, wanted) == ["pydantic", "tqdm"]
    assert choose(offered, {**have, **offered}, wanted) == []


def test_what_the_chosen_ask_for_is_chosen_too() -> None:
    offered = {
        "diffusers": package("0.42", "huggingface-hub>=1", "torch; extra == 'torch'"),
        "huggingface-hub": package("2.4", "httpx", "old; python_version < '3'"),
        "httpx": package("0.28"),
        "old": package("1"),
    }
    assert choose(offered, {}, ["diffusers"]) == ["diffusers", "httpx", "huggingface-hub"]


def test_what_is_there_and_does_not_go_with_the_new_is_replaced() -> None:
    have = {
        "transformers": package("4.57", "huggingface-hub<1", "torch"),
        "huggingface-hub": package("0.36"),
        "unrelated": package("1", "missing"),
    }
    offered = {
        "diffusers": package("0.42", "huggingface-hub>=1"),
        "huggingface-hub": package("2.4"),
        "transformers": package("5.23", "huggingface-hub>=1", "torch>=2.4"),
    }
    wanted = ["diffusers", "transformers>=4.57"]
    assert choose(offered, have, wanted) == ["diffusers", "huggingface-hub", "transformers"]


# --- installing ---------------------------------------------------------------------------------


def test_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pack's second half and unpack, with pip itself, into a folder of its own."""
    made = tmp_path / "made"
    wheel(made, "soar_trip_a", "1.0", "soar_trip_b>=2", size=3 * MIB // 2)
    wheel(made, "soar_trip_b", "2.0")
    wheel(made, "soar_trip_unasked", "1.0")

    def downloads(out: Path, **_: object) -> list[Path]:
        return sorted(made.iterdir())

    monkeypatch.setattr(gpu_wheels, "download", downloads)
    monkeypatch.setattr(wheels, "roots", lambda cuda: ["soar_trip_a"])
    monkeypatch.setattr(wheels, "_ALONE", ())
    monkeypatch.setattr(imports, "__defaults__", (None, ("soar_trip_a", "soar_trip_b")))
    out, target = tmp_path / "out", tmp_path / "target"
    assert gpu_wheels.main(["pack", str(out), "--piece-mib", "1"]) == 0
    assert "3 files, 1.5 MiB, 2 folders" in capsys.readouterr().out
    assert gpu_wheels.main(["unpack", str(out), "--target", str(target)]) == 0
    told = capsys.readouterr().out
    assert "installed: soar-trip-a, soar-trip-b" in told
    assert "imports  soar_trip_a" in told and "nothing to compile" in told
    assert not (target / "soar_trip_unasked.py").exists()
    assert gpu_wheels.main(["unpack", str(out), "--target", str(target)]) == 0
    assert "nothing, all was there" in capsys.readouterr().out
    next(out.rglob("soar_trip_b*")).unlink()
    assert gpu_wheels.main(["unpack", str(out), "--target", str(target)]) == 1
    assert "missing: 02/soar_trip_b" in capsys.readouterr().err


def test_what_is_no_wheel_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a-1-py3-none-any.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(WheelsError, match=r"a-1-py3-none-any\.whl: no wheel"):
        of_wheel(path)


def test_pips_failure_is_told(tmp_path: Path) -> None:
    path = wheel(tmp_path, "soar_bad", "1")
    with pytest.raises(WheelsError, match="failed with"):
        wheels.run_pip(["install", "--no-index", f"--target={path}", str(path)], {})


def test_imports_tells_why_not() -> None:
    found = imports(names=("json", "soar_no_such_module"))
    assert found["json"] is None
    assert found["soar_no_such_module"] == (
        "ModuleNotFoundError: No module named 'soar_no_such_module'"
    )


# --- what pip is told ---------------------------------------------------------------------------


class Recorder:
    """Stands in for pip; a download leaves ``files``."""

    def __init__(self, *files: Path) -> None:
        self.calls: list[tuple[list[str], dict[str, str]]] = []
        self.constraints = ""
        self._files = files

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.calls.append((list(arguments), dict(environment)))
        if "-c" in arguments:
            self.constraints = Path(arguments[arguments.index("-c") + 1]).read_text()
        for path in self._files:
            path.touch()


def test_torch_is_not_downloaded(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tested = tmp_path / "constraints.txt"
    tested.write_text("torch==2.13.0\nnvidia-dali-cuda130==2.4.0\n")
    pip = Recorder(out / "cuda_toolkit-13.0.3-py3-none-any.whl", out / "einops-1-py3-none-any.whl")
    found = download(out, python="3.12", cuda="13.0", tested=tested, run=pip)
    assert [path.name for path in found] == ["einops-1-py3-none-any.whl"]
    assert pip.constraints == "nvidia-dali-cuda130==2.4.0\n"
    (resolved, _), (alone, _), (source, environment) = pip.calls
    asked = {wheels.normalised(one.partition(">")[0]) for one in resolved if one[0] != "-"}
    assert {"diffusers", "pydantic", "webdataset", "nvidia-dali-cuda130", "einops"} <= asked
    assert not {"torch", "transformer-engine", "apex"} & asked
    assert "--python-version=3.12" in resolved and "--only-binary=:all:" in resolved
    assert "--no-deps" in alone and "transformer-engine-cu13" in alone
    assert "--no-deps" in source and source[-1] == "transformer-engine-torch"
    assert "stand_in" in environment["PYTHONPATH"]


def test_a_torch_that_came_along_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tested = tmp_path / "constraints.txt"
    tested.touch()
    pip = Recorder(out / "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl")
    with pytest.raises(WheelsError, match=r"torch-2\.13\.0.*: a dependency brings torch"):
        download(out, python="3.12", cuda="13.0", tested=tested, run=pip)


def test_the_extension_is_compiled_with_the_headers_that_torch_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    for part in ("cu13", "cudnn"):
        for kind in ("include", "lib"):
            (site / "nvidia" / part / kind).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.setenv("LIBRARY_PATH", "/before")
    source, pip = tmp_path / "transformer_engine_torch-2.20.2.tar.gz", Recorder()
    assert compile_extension([source], jobs=3, run=pip)
    ((arguments, environment),) = pip.calls
    assert arguments[-1] == str(source)
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(arguments)
    assert environment["CPATH"] == f"{site}/nvidia/cu13/include:{site}/nvidia/cudnn/include"
    expected = f"{site}/nvidia/cu13/lib:{site}/nvidia/cudnn/lib:/before"
    assert environment["LIBRARY_PATH"] == expected
    assert environment["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE" and environment["MAX_JOBS"] == "3"
    info = site / "transformer_engine_torch-2.20.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: transformer_engine_torch\nVersion: 2.20.2\n")
    assert not compile_extension([source], jobs=3, run=pip)
    assert not compile_extension([], jobs=3, run=pip)


def test_installing_asks_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "roots", lambda cuda: ["soar_fresh"])
    pip = Recorder()
    path = wheel(tmp_path, "soar_fresh", "1")
    assert install([path, tmp_path / "x.tar.gz"], cuda="13.0", run=pip) == ["soar-fresh"]
    ((arguments, _),) = pip.calls
    assert {"--no-index", "--no-deps"} <= set(arguments) and arguments[-1] == str(path)


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_wheels.main([command, "--help"])
    told = capsys.readouterr().out
    assert f"tools/gpu_wheels.py {command} wheels" in told
