"""Measures the converters at a model's real size, against copying the same bytes.

A transformer with random weights in bf16 is written piece by piece, converted to a checkpoint of
ours, loaded by four processes (tensor parallel 2, pipeline parallel 2) that save it again, and
converted back; what comes out is compared with the source bit for bit. ``cp``
followed by a sync of the copy takes turns with them. Every side begins with the same cache state:
its source was just read from end to end, so as much of it as fits is in memory.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from soar_mega.checkpoint.diffusers_map import diffusers_shapes
from soar_mega.checkpoint.hashing import hash_file
from soar_mega.checkpoint.raw_tensors import PIECE
from soar_mega.checkpoint.safetensors_files import StreamWriter
from soar_mega.checkpoint.weight_sources import read_transformer_config
from soar_mega.model.config import MMDiTConfig
from soar_mega.training.benchmark_reshard import reshard

LAYOUT = (2, 2)  # tensor parallel, pipeline parallel
TO_OURS, BACK, COPY = "convert_from_diffusers", "convert_to_diffusers", "cp, then sync"
START = "start of Python"


def write_random_transformer(architecture: Path, out: Path) -> int:
    """A diffusers transformer folder with random bf16 weights; returns their bytes.

    Args:
        architecture: A folder with the transformer's config.
        out: The folder to make.
    """
    out.mkdir(parents=True)
    shutil.copyfile(architecture / "transformer" / "config.json", out / "config.json")
    config = MMDiTConfig.from_diffusers(read_transformer_config(out))
    shapes = diffusers_shapes(config)
    plan = {key: (shape, "BF16") for key, shape in shapes.items()}
    draw = np.random.default_rng(0)
    step = PIECE // 2
    with StreamWriter(out, plan) as writer:
        for key, shape in shapes.items():
            left = math.prod(shape)
            while left:
                count = min(left, step)
                # Numbers that are no NaN: those of [1, 2), by their bits.
                writer.write(key, draw.integers(0x3F80, 0x4000, count, np.uint16))
                left -= count
    return writer.total_bytes


def measure_converters(architecture: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Convert there and back ``repeats`` times in ``folder``, which is made and removed.

    Returns:
        Seconds and peak memory by side, medians, and speed in units of the copy's: of the programs
        from start to end, and of what they do when they have started.

    Raises:
        RuntimeError: What came back is not the source, or a converter failed.
    """
    source, ours, back = folder / "source", folder / "ours", folder / "back"
    size = write_random_transformer(architecture, source)
    sides: dict[str, Callable[[], tuple[float, int]]] = {
        COPY: lambda: _copy(source, folder / "copy"),
        START: lambda: _tool("convert_from_diffusers.py", "--help"),
        TO_OURS: lambda: _tool("convert_from_diffusers.py", source, ours),
        BACK: lambda: _tool("convert_to_diffusers.py", ours, back, "--transformer-only"),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name in sides:
            if name == BACK:  # from what another layout saved
                other = reshard(ours, folder / "checkpoints", *LAYOUT)
                shutil.rmtree(ours)
                other.rename(ours)
            _read_through(ours if name == BACK else source)
            found[name].append(sides[name]())
        _compare(source, back)
        for made in (ours, back):
            shutil.rmtree(made)
    shutil.rmtree(folder)
    seconds = {name: statistics.median(s for s, _ in runs) for name, runs in found.items()}
    return {
        "bytes": size,
        "seconds": {name: [s for s, _ in runs] for name, runs in found.items()},
        "peak_bytes": {name: max(peak for _, peak in found[name]) for name in (TO_OURS, BACK)},
        "median_seconds": seconds,
        "times_the_copys_speed": {name: seconds[COPY] / seconds[name] for name in (TO_OURS, BACK)},
        "times_the_copys_speed_once_started": {
            name: seconds[COPY] / (seconds[name] - seconds[START]) for name in (TO_OURS, BACK)
        },
        "bit_equal_through_tensor_and_pipeline_parallel": list(LAYOUT),
    }


def _read_through(place: Path) -> None:
    for path in sorted(place.rglob("*")):
        if path.is_file():
            hash_file(path, "xxh3-128")


def _copy(source: Path, out: Path) -> tuple[float, int]:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)  # at once: three more copies of a large model are many bytes
    return seconds, 0


def _tool(name: str, *arguments: Path | str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a tool, start of Python and imports included."""
    root = Path(__file__).resolve().parents[2]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, root / "tools" / name, *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"tools/{name} failed with status {status}")
    return time.perf_counter() - began, _peak(usage)


def _peak(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * 1024


def _compare(source: Path, back: Path) -> None:
    """The files differ in nothing: the writer lays tensors out as the source has them."""
    for path in sorted(source.glob("*.safetensors")):
        if hash_file(path, "xxh3-128") != hash_file(back / path.name, "xxh3-128"):
            raise RuntimeError(f"{back / path.name} is not {path}")
