"""What tools/doctor.py finds in run folders that crashed, were damaged, or are sick."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.config import dump_yaml
from soar_mega.launch.findings import Finding, sick
from soar_mega.parallel.mesh import Mesh
from soar_mega.telemetry.metrics import MetricsWriter
from soar_mega.training.run_doctor import examine
from tests.runs import Tiny, checkpoint
from tools import doctor

PARENTS = [{"run": "first", "step": 9, "objective": "flow_matching", "weights": "ema"}]


def save(run: Path, step: int, pretrained: Path | str) -> Path:
    extra = {
        "step": step,
        "model": {"pretrained": str(pretrained)},
        "lineage": {"run": "r", "step": step, "objective": "soar", "parents": PARENTS},
    }
    state = {"model.w": BoxedTensor.whole(torch.full((64, 3), float(step)))}
    return store.save(run / "checkpoints", step, state, extra, Mesh.single()).path


def write_metrics(run: Path, *lines: dict[str, Any]) -> None:
    (run / "metrics.jsonl").unlink(missing_ok=True)
    with MetricsWriter(run) as writer:
        for number, line in enumerate(lines, 1):
            writer.write(number, {"train/loss": 1.0, "optim/grad_norm": 1.0} | line)


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Path:
    """A healthy run: checkpoints of steps 2 and 10, metrics up to 10."""
    folder = tmp_path / "run"
    for step in (2, 10):
        save(folder, step, tiny.pretrained)
    config = tiny.config("sft", folder, "checkpoint.checkpoints_total_limit=3")
    (folder / "config.resolved.yaml").write_text(dump_yaml(config))
    write_metrics(folder, *[{"health/skipped_steps": 0.0}] * 10)
    return folder


def report(run: Path, *, quick: bool = False) -> str:
    return "\n".join(map(str, examine(run, quick=quick)))


def problems(run: Path, *, quick: bool = False) -> list[Finding]:
    return [finding for finding in examine(run, quick=quick) if finding.level == "PROBLEM"]


def test_a_healthy_run(run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    assert doctor.main([str(run)]) == 0
    said = capsys.readouterr().out
    for words in (
        "config.resolved.yaml is readable",
        "step-00000002: ",
        "step-00000010: ",
        "hashes as written",
        "checkpoint.resume=latest would go on from step-00000010\n",
        "lineage: run r, step 10, objective soar\n",
        "  from run first, step 9, objective flow_matching, weights ema",
        f"base model {tiny.pretrained} is there",
        "metrics.jsonl ends with step 10\n",
        "keeping 3 (checkpoint.checkpoints_total_limit)",
    ):
        assert words in said, words
    assert said.index("step-00000002") < said.index("step-00000010")
    assert "PROBLEM" not in said
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


def test_a_flipped_bit_is_named_and_passed_over(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((checkpoint(run, 10) / "state").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (found,) = problems(run)
    assert file.name in found.text
    assert found.fix is not None
    assert "step-00000010" in found.fix
    said = report(run)
    assert "would go on from step-00000002, passing over step-00000010" in said
    assert "a start from step-00000002 does 8 of them again" in said
    assert doctor.main([str(run)]) == 1
    assert "fix: " in capsys.readouterr().out
    assert doctor.main([str(run), "--quick"]) == 0  # sizes are as they were


def test_a_file_cut_short_is_found_by_the_quick_look(run: Path) -> None:
    file = next((checkpoint(run, 2) / "state").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    (found,) = problems(run, quick=True)
    assert file.name in found.text
    assert "would go on from step-00000010\n" in report(run, quick=True)


def test_no_whole_checkpoint(run: Path) -> None:
    for step in (2, 10):
        (checkpoint(run, step) / "trainer.json").unlink()
    assert "none of the 2 checkpoints" in problems(run)[-1].text


def test_a_run_that_saved_nothing(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    said = report(run)
    assert "would start fresh" in said
    assert "a start from the beginning does 10 of them again" in said
    assert "PROBLEM" not in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("step-00000012.tmp", "being written now"),
        ("step-00000001.deleting", "on its way out"),
        ("step-00000010.replaced", "put back"),
        ("step-00000012.superseded-1", "did again"),
        ("step-00000012.damaged-2", "passed it over"),
        ("step-00000012", "manifest.json is missing"),
        ("step-abc", "its name is another"),
        ("notes", "not of this program"),
    ],
)
def test_what_else_lies_there_is_explained(run: Path, name: str, words: str) -> None:
    (run / "checkpoints" / name).mkdir()
    findings = list(examine(run))
    (found,) = [finding for finding in findings if finding.text.startswith(f"{name}: ")]
    assert words in found.text
    assert not sick(findings)


def test_steps_that_were_skipped(run: Path) -> None:
    accepted = {"health/skipped_steps": 0.0}
    sick_one = {"health/skipped_steps": 1.0, "train/loss": float("nan")}
    write_metrics(run, accepted, sick_one, sick_one | {"train/loss": 1.0})
    said = report(run)
    assert "not finite in 1 steps: 2" in said
    assert "1 steps were skipped" in said
    assert "PROBLEM" not in said


def test_a_run_that_ended_sick(run: Path) -> None:
    for counts in ((0.0, 1.0, 1.0, 2.0, 3.0), (1.0, 2.0)):
        write_metrics(run, *({"health/skipped_steps": count} for count in counts))
        (found,) = problems(run)
        assert "the last 2 steps in a row were skipped" in found.text
    assert found.fix is not None
    assert "optimizer.learning_rate" in found.fix


def test_a_disk_without_room(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(p.stat().st_size for p in checkpoint(run, 10).rglob("*") if p.is_file())
    usage = shutil.disk_usage(run)
    # Three are kept and two are there: one more, and one while the oldest is still there.
    for free, enough in ((2 * size, True), (2 * size - 7, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, f=free: usage._replace(free=f))
        found = problems(run)
        assert (not found) == enough
    assert "7 bytes are missing" in found[0].text


def test_files_that_ask_for_something(run: Path) -> None:
    (run / "save-now").touch()
    assert not problems(run)
    assert "save-now lies there" in report(run)
    (run / "stop-now").touch()
    (found,) = problems(run)
    assert found.fix is not None
    assert f"remove {run / 'stop-now'}" in found.fix


def test_a_configuration_of_another_version(run: Path) -> None:
    path = run / "config.resolved.yaml"
    path.write_text(path.read_text().replace("seed:", "sead:"))
    (found,) = problems(run)
    assert "run.sead" in found.text


def test_a_base_model_that_is_gone(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    save(run, 11, moved)
    (found,) = problems(run)
    assert str(moved) in found.text
    save(run, 11, f"somebody/unknown@{'0' * 40}")
    assert "not in this machine's cache, a start gets it" in report(run)
    assert not problems(run)


def test_no_run_folder(tmp_path: Path) -> None:
    (found,) = problems(tmp_path)
    assert "is no run folder" in found.text
