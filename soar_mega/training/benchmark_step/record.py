"""The record of a comparison: what was found, where, with what; and reading one again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import soar_mega
from soar_mega.config import ConfigError
from soar_mega.launch.provenance import git_state, package_versions
from soar_mega.telemetry.flops import known_peak_tflops
from soar_mega.training.benchmark import Case, hardware
from soar_mega.training.benchmark_step.compare import Found, Plan, compare, table_of
from soar_mega.training.benchmark_step.load import Load
from soar_mega.training.benchmark_step.measure import (
    Measured,
    Runner,
    matrix_tflops,
    runner_for,
)
from soar_mega.training.benchmark_step.variants import Variant

WHAT = "training step: this project against the published procedure on diffusers' model"
_EARLIER = "SOAR step: this project against a plain loop on diffusers' model"


def measure_all(
    plan: Plan,
    *,
    run: Runner | None = None,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what is planned.

    Args:
        plan: Loads of one device and number format.
        run: Measures one side once; None: as fits the device.
        say: Gets a line after each measurement.
        keep: Gets the record so far after each measurement.

    Returns:
        The record: machine, versions, plan; ``peak_tflops``, the device's dense bf16 peak by its
        data sheet, None where unknown; ``matrix_tflops``, what a large matrix product reaches;
        ``tables``, see ``compare.table_of``.
    """
    load = plan.loads[0]
    peak = None
    if load.device == "cuda":
        peak = known_peak_tflops(torch.cuda.get_device_name())
    record = {
        "what": WHAT,
        "hardware": machine(load.device),
        "versions": versions(),
        "git": git_state(Path(soar_mega.__file__).parents[1]),
        "device": load.device,
        "dtype": load.dtype,
        "repeats": plan.repeats,
        "steps": plan.steps,
        "warmup": plan.warmup,
        "peak_tflops": peak,
        "matrix_tflops": matrix_tflops(load),
    }
    tables = compare(
        plan,
        run or runner_for(load.device),
        peak_tflops=peak,
        say=say,
        keep=lambda tables: keep(record | {"tables": tables}),
    )
    return record | {"tables": tables}


def machine(device: str) -> dict[str, Any]:
    """Names and sizes of what was measured on."""
    facts: dict[str, Any] = {"cpu": hardware(), "usable_cores": len(os.sched_getaffinity(0))}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "driver": _driver(),
        }
    return facts


def versions() -> dict[str, str | None]:
    """Of Python, CUDA, cuDNN and every package that matters; None: not there."""
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {
        "soar_mega": soar_mega.__version__,
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda,
        "cuDNN": None if cudnn is None else str(cudnn),
        **package_versions(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def read_record(path: Path) -> dict[str, Any]:
    """A record that ``tools/benchmark.py gpu`` or ``cpu`` wrote, or ``step`` before there were two.

    Raises:
        ConfigError: The file is no such record.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    what = record.get("what") if isinstance(record, dict) else None
    if what == _EARLIER:
        return _from_earlier(record)
    if what != WHAT:
        raise ConfigError(
            f"{path} is a record of {what!r}, not of a {WHAT!r}: give one that gpu or cpu wrote"
        )
    return record


def _from_earlier(record: Mapping[str, Any]) -> dict[str, Any]:
    """In today's form. It had SOAR alone, no optimizer, and the reference did not recompute."""
    case = Case(**record["case"])
    load = Load(
        "small",
        case.architecture(),
        "soar",
        device="cpu",
        dtype="fp32",
        latent_size=case.latent_size,
        text_tokens=case.text_tokens,
        trajectory_length=case.trajectory_length,
        optimizer=False,
        threads=case.threads,
    )
    sides = {
        "ours": Variant(aux_group_size=case.aux_group_size, micro_batch_size=case.batch),
        "plain": Variant("reference", micro_batch_size=case.batch),
    }
    found: Found = {
        variant: [
            # Of its steps only the median was kept, and not what was held before.
            Measured((run["seconds"],), 0, int(run["peak_growth_mib"] * 2**20), float("nan"), 0.0)
            for run in record["runs"][name]
        ]
        for name, variant in sides.items()
    }
    table = table_of(load, found, None)
    for side in table["sides"]:
        side["median"]["total_peak_bytes"] = None
    return {
        "what": WHAT,
        "hardware": {"cpu": record["hardware"]},
        "versions": {"torch": record["torch"]},
        "device": load.device,
        "dtype": load.dtype,
        "peak_tflops": None,
        "matrix_tflops": None,
        "tables": [table],
        "command": record["command"],
    }
