"""The command as typed, alone and under torchrun, and what it leaves in the run folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from soar_mega.config import load_config
from tests.runs import (
    REPOSITORY,
    Tiny,
    assert_nothing_written,
    checkpoint,
    command,
    losses,
    metrics,
    trainer_record,
)

PLAIN_LINE = re.compile(
    r"step (\d)/2  loss \d+\.\d{4}  grad_norm \d+\.\d{2}  lr \S+  \d+\.\d samples/s  eta \d+:\d\d"
)
STANDARD = {
    "data/bad_samples",
    "data/epoch",
    "health/skipped_steps",
    "train/loss",
    "train/loss_base",
    "train/loss_aux",
    "train/aux_points_per_sample",
    "optim/grad_norm",
    "optim/lr",
    "perf/step_time_s",
    "perf/samples_per_s",
    "perf/data_wait_pct",
    "perf/mfu",
}


def type_command(launcher: list[str], arguments: list[str]) -> str:
    """Run it, standard output being no terminal; returns that."""
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*launcher, "-m", "soar_mega.train", *arguments],
        cwd=REPOSITORY,
        env=variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def typed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """``single`` and ``torchrun``: the run folder and what was shown."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launchers = {
        "single": ([sys.executable], []),
        "torchrun": (
            [sys.executable, "-m", *torchrun],
            ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        ),
    }
    runs = {}
    for name, (launcher, overrides) in launchers.items():
        folder = tmp_path_factory.mktemp("typed") / name
        arguments = tiny.arguments(
            "soar", folder, "train.max_train_steps=2", "logging.peak_tflops=0.1", *overrides
        )
        runs[name] = folder, type_command(launcher, arguments)
    return runs


@pytest.mark.parametrize("how", ["single", "torchrun"])
def test_run_folder(how: str, typed: dict[str, tuple[Path, str]]) -> None:
    folder, _ = typed[how]
    tensor = 2 if how == "torchrun" else 1
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.resolved.yaml", "env.json", "metrics.jsonl", "checkpoints"}

    config = load_config(folder / "config.resolved.yaml")
    assert config.run.dir == str(folder)
    assert config.parallel.tensor_model_parallel_size == tensor
    environment = json.loads((folder / "env.json").read_text())
    assert environment["packages"]["torch"]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line.keys() - {"step"} >= STANDARD
        rest = line.keys() - STANDARD - {"step"}
        assert rest and all(re.fullmatch(r"train/loss_t_bin_\d", name) for name in rest)
        assert line["train/loss"] > 0 and line["optim/grad_norm"] > 0
        assert line["train/aux_points_per_sample"] <= 4
        assert line["perf/mfu"] > 0

    last = checkpoint(folder, 2)
    record = trainer_record(last)
    assert (record["step"], record["lineage"]["objective"]) == (2, "soar")
    assert Path(record["model"]["pretrained"]).is_dir()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [last.name]


@pytest.mark.parametrize("how", ["single", "torchrun"])
def test_plain_lines(how: str, typed: dict[str, tuple[Path, str]]) -> None:
    """No bar, no carriage return; one process speaks."""
    folder, shown = typed[how]
    assert "\r" not in shown and "\x1b" not in shown
    lines = shown.splitlines()
    steps = [found[1] for line in lines if (found := PLAIN_LINE.fullmatch(line))]
    assert steps == ["1", "2"]
    processes = "2 process(es), tensor parallel 2" if how == "torchrun" else "1 process(es)"
    assert processes in lines[0] and str(folder) in lines[0]
    assert lines[-1].startswith(f"checkpoint: {checkpoint(folder, 2)} (written in ")
    assert len(lines) == len(set(lines))


def test_torchrun_trains_the_same(typed: dict[str, tuple[Path, str]]) -> None:
    assert losses(typed["torchrun"][0]) == pytest.approx(losses(typed["single"][0]), rel=1e-5)


def test_print_config_loads_back(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.arguments("soar", tmp_path / "run", "optimizer.learning_rate=3e-5")
    assert command([*arguments, "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(arguments[0], arguments[1:])
    assert load_config(printed).optimizer.learning_rate == 3e-5
    assert_nothing_written(tmp_path / "run")


def test_tiny_configs() -> None:
    """Fine-tuning and SOAR differ in the objective only, so that their results compare."""
    configs = {
        name: load_config(REPOSITORY / "configs" / f"tiny_{name}.yaml")
        for name in ("pretrain", "sft", "soar")
    }
    sft, soar = configs["sft"].model_dump(), configs["soar"].model_dump()
    assert {key for key in sft if sft[key] != soar[key]} == {"objective"}
    names = [config.objective.name for config in configs.values()]
    assert names == ["flow_matching", "flow_matching", "soar"]
    assert configs["pretrain"].model.init == "random"
    for config in configs.values():
        assert config.train.global_batch_size >= 8
        assert config.precision.compute_dtype == "fp32"


def run(tiny: Tiny, folder: Path, *overrides: str) -> list[dict[str, float]]:
    """Metrics of two steps of SOAR."""
    arguments = tiny.arguments("soar", folder, "train.max_train_steps=2", *overrides)
    assert command(arguments) == 0
    return metrics(folder)


def test_bf16_is_near_fp32(tiny: Tiny, tmp_path: Path) -> None:
    fp32 = run(tiny, tmp_path / "fp32")
    bf16 = run(
        tiny,
        tmp_path / "bf16",
        "precision.compute_dtype=bf16",
        "precision.grad_reduce_dtype=bf16",
    )
    for near, exact in zip(bf16, fp32, strict=True):
        assert near["train/loss"] != exact["train/loss"]
        assert near["train/loss"] == pytest.approx(exact["train/loss"], rel=0.02)
        assert near["optim/grad_norm"] == pytest.approx(exact["optim/grad_norm"], rel=0.05)


def test_recomputing_activations_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    kept = run(tiny, tmp_path / "none", "train.activation_checkpointing=none")
    for mode in ("selective", "full"):
        assert run(tiny, tmp_path / mode, f"train.activation_checkpointing={mode}") == kept


def test_the_loss_falls(tiny: Tiny, tmp_path: Path) -> None:
    """Twelve steps, two epochs: the trainer does train."""
    arguments = tiny.arguments(
        "pretrain",
        tmp_path,
        "train.max_train_steps=12",
        "optimizer.learning_rate=3e-3",
        "optimizer.lr_warmup_steps=0",
    )
    assert command(arguments) == 0
    found = losses(tmp_path)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
