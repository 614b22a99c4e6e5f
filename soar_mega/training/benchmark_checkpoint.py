"""Measures saving in the background against saving at once, and verifying and loading.

The state is what a run of one process saves: fp32 weights, their average and Adam's two moments.
Both sides take turns in one process; the first save of each side makes its buffers and is not
counted. Between saves a stand-in for training keeps a core busy, so that what the background's
thread takes from it shows as well.
"""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.checkpointer import Checkpointer
from soar_mega.checkpoint.manifest import read_manifest
from soar_mega.checkpoint.retention import Retention
from soar_mega.checkpoint.selection import select
from soar_mega.parallel.mesh import Mesh

AT_ONCE, BACKGROUND = "at once", "in the background"
_KINDS = (store.MODEL, store.EMA, "optimizer.exp_avg.", "optimizer.exp_avg_sq.")


@dataclass(frozen=True)
class StateCase:
    """A model of so many million parameters, in square matrices of this width."""

    million_parameters: int = 200
    width: int = 1536


def measure_checkpoints(case: StateCase, repeats: int, folder: Path) -> dict[str, Any]:
    """Save, verify and load in ``folder``, which is emptied.

    Returns:
        Seconds by side, their medians, and the share of the stall that is left.

    Raises:
        RuntimeError: What was loaded is not what was saved.
    """
    mesh, count = Mesh.single(), case.million_parameters * 10**6 // case.width**2
    state = {
        f"{kind}{number}": torch.randn(case.width, case.width)
        for number in range(count)
        for kind in _KINDS
    }
    boxes = {name: BoxedTensor.whole(tensor) for name, tensor in state.items()}
    sides = {
        name: Checkpointer(folder / name, mesh, Retention(1), background=name == BACKGROUND)
        for name in (AT_ONCE, BACKGROUND)
    }
    stalls: dict[str, list[float]] = {name: [] for name in sides}
    written: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {"alone": [], "beside a save": []}
    for step in range(repeats + 1):
        for name in list(sides)[:: 1 if step % 2 else -1]:
            began = time.perf_counter()
            sides[name].save(step, boxes, {"step": step})
            stall = time.perf_counter() - began
            beside = _work()
            sides[name].settle()
            if step:
                stalls[name].append(stall)
                written[name].append(sides[name].finished()[0].seconds)
                busy["beside a save" if name == BACKGROUND else "alone"].append(beside)
            else:
                sides[name].finished()
    read = [_read(folder / AT_ONCE, state, mesh) for _ in range(repeats)]
    path = store.find(folder / AT_ONCE)
    size = read_manifest(path).size
    shutil.rmtree(folder)
    median = {name: statistics.median(seconds) for name, seconds in stalls.items()}
    return {
        "bytes": size,
        "parameters": count * case.width**2,
        "stall_s": stalls,
        "written_s": written,
        "work_s": busy,
        "verify_s": [verify for verify, _ in read],
        "load_s": [load for _, load in read],
        "median": {
            "stall_s": median,
            "written_s": {name: statistics.median(all_) for name, all_ in written.items()},
            "work_s": {name: statistics.median(all_) for name, all_ in busy.items()},
            "verify_s": statistics.median(verify for verify, _ in read),
            "load_s": statistics.median(load for _, load in read),
        },
        "stall_left": median[BACKGROUND] / median[AT_ONCE],
    }


def _work() -> float:
    """Seconds for some matrix products."""
    left, began = torch.randn(1024, 1024), time.perf_counter()
    for _ in range(20):
        left = left @ left / 32
    return time.perf_counter() - began


def _read(root: Path, state: dict[str, Tensor], mesh: Mesh) -> tuple[float, float]:
    """Seconds to verify and to load the newest checkpoint."""
    began = time.perf_counter()
    path = select("latest", root, mesh).path
    verified = time.perf_counter()
    assert path is not None
    targets = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    middle = time.perf_counter()
    store.load(path, {name: BoxedTensor.whole(t) for name, t in targets.items()}, mesh)
    loaded = time.perf_counter()
    if not all(torch.equal(targets[name], state[name]) for name in state):
        raise RuntimeError("the state that was loaded is not the one that was saved")
    return verified - began, loaded - middle
