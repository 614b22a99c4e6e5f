"""tools/evaluate.py: the same on any number of processes, after a kill, and while training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soar_mega.checkpoint.exporter import export
from soar_mega.data.tiny.pages import make_pages
from soar_mega.evaluation.scoring import ScoringError
from soar_mega.training.evaluation import Evaluation
from tests.distributed.harness import run_ranks, warm_context
from tests.ports import free_port
from tests.runs import REPOSITORY, Tiny, command, metrics, start, train
from tools import evaluate as tool

PROMPTS, BATCH, STEPS = 5, 2, 2
SCORERS = ("handwriting", "handwriting_frechet")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tool would draw on the GPU")


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained ``run``, its ``export``, and ``prompts.txt``; the tools' working directory."""
    made = tmp_path_factory.mktemp("evaluate")
    pages = make_pages(PROMPTS, 3, held_out=True)
    (made / "prompts.txt").write_text("".join(f"{page.caption}\n" for page in pages))
    assert command(tiny.arguments("sft", made / "run", f"train.max_train_steps={STEPS}")) == 0
    export(made / "run", made / "export")
    return made


def arguments(out: str | Path, *more: str, models: Sequence[str] = ("run", "export")) -> list[str]:
    return [
        *models,
        *("--prompts", "prompts.txt", "--out", str(out), "--steps", str(STEPS)),
        *("--format", "handwriting", "--batch", str(BATCH), "--repeats", "2", *more),
    ]


def scored(out: str | Path, *more: str, **options: Any) -> list[str]:
    return arguments(out, "--scorers", *SCORERS, *more, **options)


def run_tool(folder: Path, world_size: int, given: list[str]) -> tuple[list[int], list[str]]:
    """The tool on so many processes; exit codes and what each wrote to stderr."""
    port = free_port()
    out = folder / f"out-{time.monotonic_ns()}"
    out.mkdir()
    processes = []
    for rank in range(world_size):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(
            warm_context().Process(  # type: ignore[attr-defined]
                target=_enter, args=({k: str(v) for k, v in place.items()}, folder, out, given)
            )
        )
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
        process.join()
    told = [(out / f"{rank}").read_text() for rank in range(world_size)]
    return [process.exitcode for process in processes], told


def _enter(place: dict[str, str], folder: Path, out: Path, given: list[str]) -> None:
    os.environ.update(place | {"OMP_NUM_THREADS": "1"})
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stderr = (out / place["RANK"]).open("w", buffering=1)
    sys.stdout = sys.stderr
    sys.exit(tool.main(given))


def evaluated(folder: Path, world_size: int, given: list[str]) -> Path:
    codes, told = run_tool(folder, world_size, given)
    assert codes == [0] * world_size, "\n".join(told)
    assert not any(told[1:]), told[1:]
    return folder / given[given.index("--out") + 1]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """What one process leaves."""
    return evaluated(folder, 1, scored("alone"))


def pictures(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.glob("pictures/*/*.png"))
    }


def assert_same(out: Path, expected: Path) -> None:
    assert pictures(out) == pictures(expected)
    for name in ("results.json", "scores.jsonl", "report.html", "report.png"):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name


def test_one_process(alone: Path, folder: Path) -> None:
    results = json.loads((alone / "results.json").read_text())
    assert list(results["models"]) == ["run", "export"]
    model = results["models"]["run"]
    assert (model["given"], model["step"], model["weights"]) == ("run", STEPS, "ema")
    assert results["models"]["export"]["exported_from"] == model["checkpoint"]
    found = results["scorers"]["handwriting"]
    assert found["overall"] == "categories" and found["citation"]
    for estimate in (metric["overall"] for metric in found["models"]["run"].values()):
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
        assert (estimate["prompts"], estimate["pictures"]) == (PROMPTS, 2 * PROMPTS)
    assert set(results["scorers"]["handwriting_frechet"]["models"]["run"]) == {"pixels", "reader"}
    lines = [json.loads(line) for line in (alone / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * PROMPTS
    for line in lines:
        assert (alone / line["file"]).is_file()
        assert set(line["scores"]["handwriting"]) == set(found["models"]["run"])
    own: dict[str, list[float]] = {}
    for line in lines:
        if line["model"] == "run":
            own.setdefault(line["category"], []).append(line["scores"]["handwriting"]["paper"])
    expected = {kind: float(np.mean(values)) for kind, values in own.items()}
    paper = found["models"]["run"]["paper"]
    assert {k: v["value"] for k, v in paper["categories"].items()} == pytest.approx(expected)
    assert paper["overall"]["value"] == pytest.approx(np.mean(list(expected.values())))
    text = (folder / "prompts.txt").read_text().splitlines()
    assert [line["text"] for line in lines[: 2 * PROMPTS : 2]] == text


def test_checkpoint_and_export_draw_the_same(alone: Path) -> None:
    drawn = pictures(alone)
    assert len(drawn) == 2 * 2 * PROMPTS
    for name in drawn:
        assert drawn[name] == drawn[name.replace("pictures/run/", "pictures/export/")]
    assert len(set(drawn.values())) == 2 * PROMPTS  # prompts and repeats differ


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_processes(alone: Path, folder: Path, world_size: int) -> None:
    assert_same(evaluated(folder, world_size, scored(f"data-{world_size}")), alone)


def test_a_model_in_parts(alone: Path, folder: Path) -> None:
    """Tensor ranks sum in another order, so pictures are close; stages compute the same bits."""
    more = ("--tensor-parallel", "2")
    tensor = evaluated(folder, 2, scored("tensor", *more, models=["run"]))
    for name, data in pictures(tensor).items():
        with Image.open(tensor / name) as one, Image.open(alone / name) as other:
            left, right = (np.asarray(image, dtype=int) for image in (one, other))
        assert np.abs(left - right).max() <= 2, name
        assert data
    staged = evaluated(folder, 4, scored("stages", "--pipeline-parallel", "2", models=["run"]))
    found, expected = (json.loads((p / "results.json").read_text()) for p in (staged, alone))
    assert pictures(staged).items() <= pictures(alone).items()
    for name in SCORERS:
        by_label = found["scorers"][name]["models"]
        assert by_label["run"] == expected["scorers"][name]["models"]["run"]


def test_killed_and_given_again(alone: Path, folder: Path) -> None:
    out = folder / "killed"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py"), *arguments(out)]
    process = subprocess.Popen(line, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list(out.glob("pictures/run/*.png"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in out.glob("pictures/*/*.png")}
    assert 3 <= len(there) < 4 * PROMPTS and not (out / "results.json").exists()
    evaluated(folder, 1, scored("killed"))
    assert all(path.stat().st_mtime_ns == when for path, when in there.items())
    assert_same(out, alone)
    kept = json.loads((out / "run.json").read_text())["models"]
    assert sum(model["kept"] for model in kept.values()) <= len(there)  # by whole batches


def test_more_of_the_same(alone: Path, folder: Path) -> None:
    """Fewer prompts and repeats first, then the rest, then scores: nothing is drawn twice."""
    given = arguments("grown", "--limit", "3", "--repeats", "1")
    evaluated(folder, 1, given)
    assert len(pictures(folder / "grown")) == 2 * 3
    assert json.loads((folder / "grown" / "results.json").read_text())["scorers"] == {}
    evaluated(folder, 1, arguments("grown"))
    _, told = run_tool(folder, 1, scored("grown"))
    assert f"run: all {2 * PROMPTS} pictures are there" in told[0]
    assert "handwriting/correct" in told[0]
    assert_same(folder / "grown", alone)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--limit", "0"], "--limit = 0 must be at least 1"),
        (["--batch", "0"], "--batch = 0 must be at least 1"),
        (["--guidance", "nan"], "--guidance = nan must be a number"),
        (["--size", "60"], "--size = 60 must be a multiple of 16"),
        (["--size", "512"], "at most 192, the side of its position table"),
        (["--prompts", "absent"], "absent"),
        (["--format", "absent"], "absent"),
        (["--scorers", "absent"], "--scorers = absent: no scorer 'absent'"),
        (["--scorers", "handwriting", "--size", "32"], "cannot judge 32 px pictures"),
        (["--tensor-parallel", "3"], "does not divide the number of processes, 1"),
        (["--pipeline-parallel", "2"], "does not divide the number of processes, 1"),
    ],
)
def test_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    assert tool.main(arguments("refused", *more)) == 78
    told = capsys.readouterr().err
    assert told.startswith("error: ") and words in told
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["absent"], "absent"),
        (["owner/name"], "add @COMMIT"),
        (["a/run", "run"], "has the label run, too"),
    ],
)
def test_models_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    models: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    assert tool.main(arguments("refused", models=models)) == 78
    assert words in capsys.readouterr().err


def test_a_refusal_ends_every_rank_with_its_code(folder: Path) -> None:
    """In whole interpreters: a process group that is left up aborts the exit now and then."""
    (folder / "empty").mkdir()
    line = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py")]
    line += arguments("refused", models=["run=empty"])
    for _ in range(3):
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        place |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                line,
                cwd=folder,
                env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        told = [process.communicate(timeout=300)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [78, 78], told
        assert "no committed checkpoint" in told[0] and not told[1]


def test_refused_on_all_ranks_alike(alone: Path, folder: Path) -> None:
    codes, told = run_tool(folder, 2, arguments("refused", "--limit", "0"))
    assert codes == [78, 78] and told[0].count("\n") == 1 and not told[1]
    # Other settings than the pictures that are there.
    shutil.copytree(alone, folder / "other")
    codes, told = run_tool(folder, 2, scored("other", "--guidance", "3"))
    assert codes == [78, 78] and not told[1]
    (line,) = told[0].splitlines()
    assert "guidance 4.5, now 3.0" in line and "choose another --out or label" in line
    (folder / "prompts2.txt").write_text("red 123 on white\n")
    codes, told = run_tool(folder, 1, arguments("other", "--prompts", "prompts2.txt"))
    assert codes == [78] and "prompts sha256:" in told[0]


# --- while training ------------------------------------------------------------------------------


def hook(folder: Path, *more: str) -> list[str]:
    return [
        f"train.max_train_steps={STEPS}",
        "validation.evaluate_steps=1",
        f"validation.evaluate_prompts={folder / 'prompts.txt'}",
        "validation.evaluate_format=handwriting",
        f"validation.evaluate_scorers=[{', '.join(SCORERS)}]",
        f"validation.num_inference_steps={STEPS}",
        *more,
    ]


def of_evaluation(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name.startswith("eval/")}


@pytest.fixture(scope="module")
def hooked(folder: Path, tiny: Tiny) -> Path:
    """The run of ``folder`` with evaluations."""
    more = hook(folder)
    assert command(tiny.arguments("sft", folder / "hooked", *more)) == 0
    return folder / "hooked"


def test_training_reports_what_the_tool_says(folder: Path, tiny: Tiny, hooked: Path) -> None:
    size = tiny.config("sft", folder / "x").train.micro_batch_size
    tail = ("--repeats", "1", "--batch", str(size))
    out = evaluated(folder, 1, scored("tool", *tail, models=["hooked"]))
    found = json.loads((out / "results.json").read_text())["scorers"]
    expected = {}
    for name in SCORERS:
        for metric, estimates in found[name]["models"]["hooked"].items():
            expected[f"eval/{name}/{metric}"] = estimates["overall"]["value"]
            for kind, estimate in estimates["categories"].items():
                expected[f"eval/{name}/{metric}/{kind}"] = estimate["value"]
    first, last = metrics(hooked)
    assert of_evaluation(last) == expected and of_evaluation(first).keys() == expected.keys()


def test_training_is_untouched_by_it(folder: Path, hooked: Path) -> None:
    rest = [
        {name: value for name, value in line.items() if not name.startswith("eval/")}
        for line in metrics(hooked)
    ]
    assert rest == metrics(folder / "run")


def train_on_two(tiny: Tiny, folder: Path) -> list[dict[str, float]]:
    found = []
    for name, more in (("data", 1), ("stages", 2)):
        size = f"parallel.pipeline_model_parallel_size={more}"
        train(tiny.config("sft", folder / f"hooked-{name}", *hook(folder, size)))
        run = start(tiny.config("sft", folder / f"again-{name}", *hook(folder, size)))
        calls: list[int] = []
        broken = Evaluation(run).measure(leaves=lambda calls=calls: bool(calls.append(1)) or True)
        assert broken == {} and len(calls) == 1
        found.append(Evaluation(run).measure())
        run.feed.close()
    return found


def test_training_on_two_processes(folder: Path, tiny: Tiny, hooked: Path) -> None:
    ranks = run_ranks(2, train_on_two, tiny, folder)
    for one, other in zip(*ranks, strict=True):
        assert one and one == other
    for name in ("data", "stages"):
        for line, expected in zip(metrics(folder / f"hooked-{name}"), metrics(hooked), strict=True):
            assert of_evaluation(line) == pytest.approx(of_evaluation(expected), rel=0.05, abs=0.02)


def test_a_scorer_that_fails_while_training(
    folder: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ScoringError("the scorer handwriting failed: no reason")

    monkeypatch.setattr(Evaluation, "measure", fail)
    assert command(tiny.arguments("sft", folder / "failing", *hook(folder))) == 0
    assert "evaluation of step 2: the scorer handwriting failed" in capsys.readouterr().out
    assert not of_evaluation(metrics(folder / "failing")[-1])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("evaluate_prompts=null", "needs validation.evaluate_prompts"),
        ("evaluate_scorers=[]", "needs validation.evaluate_scorers"),
        ("evaluate_prompts=absent", "validation.evaluate_prompts = absent"),
        ("evaluate_format=absent", "validation.evaluate_format = absent"),
        ("evaluate_scorers=[absent]", "validation.evaluate_scorers = absent: no scorer"),
        ("evaluate_scorers=[handwriting, handwriting]", "comes once"),
    ],
)
def test_training_refuses(
    folder: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str], setting: str, words: str
) -> None:
    more = hook(folder, f"validation.{setting}")
    assert command(tiny.arguments("sft", folder / "refused", *more)) == 78
    assert words in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    printed = capsys.readouterr().out
    assert "torchrun --nproc-per-node" in printed and max(map(len, printed.splitlines())) <= 100
