"""One side, measured once: times of steps, and memory of one.

On a CPU each measurement is a fresh process: memory is the kernel's own count of the process, and
what an earlier side's allocator kept would hide in it. On CUDA the sides take turns in one process,
where torch counts its own allocations exactly; each is built anew, as a large model leaves no room
for a second, and what it took is given back before the next.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.training.benchmark_step.load import Load
from soar_mega.training.benchmark_step.ours import OurSide
from soar_mega.training.benchmark_step.reference import ReferenceSide
from soar_mega.training.benchmark_step.variants import Variant, parse_variant


@dataclass(frozen=True)
class Measured:
    """What one measurement found.

    Attributes:
        seconds: Of each timed step.
        held_bytes: Memory before the watched step: weights, gradients, optimizer. On a CPU the
            whole process with all its libraries.
        peak_growth_bytes: The most the watched step had beyond that: activations, mostly.
        loss: Of the last step.
        ready_seconds: Until the first timed step: building, compiling, warming up.
    """

    seconds: tuple[float, ...]
    held_bytes: int
    peak_growth_bytes: int
    loss: float
    ready_seconds: float


@dataclass(frozen=True)
class Failure:
    """A variant that cannot be measured, and why."""

    reason: str


Outcome = Measured | Failure
Runner = Callable[[Load, Variant, int, int], Outcome]


def measure(load: Load, variant: Variant, steps: int, warmup: int) -> Measured:
    """In this process.

    Args:
        load, variant: What is computed and how.
        steps: Timed ones.
        warmup: Before them, at least 1.

    Raises:
        FloatingPointError: The loss is not finite: the times would be those of something else.
        Exception: Whatever keeps the variant from running.
    """
    began = time.perf_counter()
    if load.threads is not None:
        torch.set_num_threads(load.threads)
    side = (OurSide if variant.side == "ours" else ReferenceSide)(load, variant)
    on_cuda = load.device == "cuda"
    # The first step also loads libraries and tries kernels out, which is no step's memory.
    for _ in range(warmup):
        side.step()
    memory = (_cuda_memory if on_cuda else _cpu_memory)(side.step)
    ready = time.perf_counter() - began
    seconds = []
    for _ in range(steps):
        took, loss = _timed(side.step, on_cuda)
        seconds.append(took)
    if not math.isfinite(float(loss)):
        raise FloatingPointError(f"the loss after {warmup + steps} steps is {float(loss)}")
    return Measured(tuple(seconds), *memory, float(loss), ready)


def _timed(step: Callable[[], Tensor], on_cuda: bool) -> tuple[float, Tensor]:
    """Seconds of a step that begins and ends with an idle device, as a trainer's do."""
    if not on_cuda:
        began = time.perf_counter()
        loss = step()
        return time.perf_counter() - began, loss
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    loss = step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, loss


def _cuda_memory(step: Callable[[], Tensor]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return held, torch.cuda.max_memory_allocated() - held


def _cpu_memory(step: Callable[[], Tensor]) -> tuple[int, int]:
    gc.collect()
    # glibc keeps what was freed; other C libraries have no such call.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    held = _status_bytes("VmRSS")
    step()
    return held, max(_status_bytes("VmHWM") - held, 0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def here(load: Load, variant: Variant, steps: int, warmup: int) -> Outcome:
    """``measure`` in this process, and all its memory given back; a failure is an outcome."""
    try:
        return measure(load, variant, steps, warmup)
    except Exception as error:
        # Only words: the error's frames would keep the side and its memory.
        return Failure(_reason(error))
    finally:
        _give_back(load)


def _give_back(load: Load) -> None:
    if load.device == "cuda":
        # Compiled code is kept by model; after a few it would silently not be compiled any more.
        torch.compiler.reset()
    gc.collect()
    if load.device == "cuda":
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]}"[:400]


def in_fresh_process(load: Load, variant: Variant, steps: int, warmup: int) -> Outcome:
    """``measure`` in a process of its own; that it ends without an answer is a failure, too."""
    task = json.dumps([asdict(load), variant.spec, steps, warmup])
    done = subprocess.run(
        [sys.executable, "-m", __name__, task], capture_output=True, text=True, check=False
    )
    if done.returncode < 0:
        return Failure(f"its process was ended by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return Failure(f"its process ended with code {done.returncode}: {lines[-1]}"[:400])
    return outcome_from_json(json.loads(done.stdout.splitlines()[-1]))


def outcome_from_json(record: dict[str, Any]) -> Outcome:
    """The inverse of ``dataclasses.asdict``."""
    if "reason" in record:
        return Failure(**record)
    return Measured(**{**record, "seconds": tuple(record["seconds"])})


def runner_for(device: str) -> Runner:
    """How the sides of a comparison are kept apart on a device."""
    return in_fresh_process if device == "cpu" else here


def matrix_tflops(load: Load) -> float:
    """TFLOP/s of the best large square matrix product here: what this device can really do."""
    size = 8192 if load.device == "cuda" else 1024
    if load.threads is not None:
        torch.set_num_threads(load.threads)
    a, b = (torch.randn(size, size, device=load.device, dtype=load.torch_dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    seconds = [_timed(product, load.device == "cuda")[0] for _ in range(20)]
    # Not the first ones, which choose a kernel, and not the fastest alone.
    return 2 * size**3 / statistics.median(sorted(seconds)[:10]) / 1e12


if __name__ == "__main__":
    given, spec, timed_steps, warmup_steps = json.loads(sys.argv[1])
    outcome = here(Load.from_json(given), parse_variant(spec), timed_steps, warmup_steps)
    print(json.dumps(asdict(outcome)))
