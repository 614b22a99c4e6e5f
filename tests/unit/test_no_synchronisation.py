"""A step never waits for the device: nothing between its first pass and its last reads a number
back from it.

Twice: with "the device" on ``meta``, whose tensors have no numbers, so that reading one is an error
whoever does it, while the host's tensors stay real; and on the CPU, where a mode sees every
operation, those of the backwards too. What is read outside of the passes is in
``training/step.py``: the losses and the gradient norm, by which a step is accepted, once a step.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import soar_mega
from soar_mega.backends.torch import TorchBackend
from soar_mega.config import FlowMatchingConfig, SoarConfig
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.init import initialise
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import MicroBatch, TextCondition
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule

PACKAGE = Path(soar_mega.__file__).parent
MODEL = MMDiTConfig(
    sample_size=8,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
OBJECTIVES = {
    "sft": FlowMatchingConfig(name="flow_matching"),
    "soar": SoarConfig(name="soar", trajectory_length=3, aux_group_size=2),
    "soar_two_paths": SoarConfig(
        name="soar", trajectory_length=2, num_rollout_paths=2, reuse_base_forward=False
    ),
}
# Of the tensors that these find on the host: they are in the host's memory from their making.
ON_THE_HOST = {
    "objectives/soar.py:begin": "an entry of the sigma table, which no device ever has",
    "rng.py:_per_row": "the slots of a microbatch and the numbers of states are checked",
}
_READERS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}


def reads(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation on a device would have to wait for its result, or its shape."""
    name = func.overloadpacket.__name__
    if name in _READERS or (name == "repeat_interleave" and "Tensor" in func._overloadname):
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [x for x in args[1] if x is not None]
        return any(x.dtype in (torch.bool, torch.uint8) for x in indices)
    return False


class Watch(TorchDispatchMode):
    """Where something is read, and what is copied to or from a device and waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()
        self.on_device: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if reads(func, args):
            where = ours()
            self.read[where] += 1
            if any(x.device.type != "cpu" for x in tensors):
                self.on_device.append(f"{func} in {where}")
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            ends = {x.device.type for x in [*tensors, result]}
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if len(ends) > 1 and waits:
                self.copies.append(f"{func} between {sorted(ends)} in {ours()}")
        return result


def ours() -> str:
    """``file:function`` of the package that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(PACKAGE)):
            return f"{Path(frame.filename).relative_to(PACKAGE).as_posix()}:{frame.name}"
    return "outside of the package"


def microbatch(device: str) -> MicroBatch:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def condition(rows: int) -> TextCondition:
        return TextCondition(draw(rows, 5, 24), draw(rows, 20))

    weight = torch.ones(2, device=device)
    return MicroBatch(3, torch.arange(2), draw(2, 16, 8, 8), condition(2), condition(1), weight)


def watched_step(objective_name: str, device: str, recompute: str, schedule: str) -> Watch:
    mesh = Mesh.single(device)
    stage = MMDiTStage(MODEL, mesh, TorchBackend(), activation_checkpointing=recompute)  # type: ignore[arg-type]
    if device == "cpu":
        initialise(stage, 0)
    parameters = ShardedParameters([stage], mesh, torch.bfloat16)
    objective = make_objective(OBJECTIVES[objective_name], shift=3.0, seed=0)
    plan = build_schedule(schedule, objective.passes(), ranks=1, microbatches=2)
    micros = [microbatch(device), microbatch(device)]
    pipeline = Pipeline([stage], mesh, plan)
    with Watch() as watch:
        parameters.zero_gradients()
        counts = torch.stack([objective.count(micro) for micro in micros]).sum(dim=0)
        terms = pipeline.train_step(objective, micros, objective.normaliser(counts))
        parameters.gradient_norm(parameters.reduce_gradients())
    assert len(terms) == 2
    return watch


def cases(short: list[tuple[str, str]], others: Sequence[str]) -> list[Any]:
    """Those of the short run, and all the rest for the full one."""
    rest = [case for case in product(OBJECTIVES, others) if case not in short]
    return [*short, *(pytest.param(*case, marks=pytest.mark.full) for case in rest)]


@pytest.mark.parametrize(
    ("objective", "schedule"),
    cases([("sft", "1f1b"), ("soar_two_paths", "zero_bubble")], ["1f1b", "zero_bubble"]),
)
def test_nothing_is_read_from_a_device(objective: str, schedule: str) -> None:
    watch = watched_step(objective, "meta", "none", schedule)
    assert watch.on_device == []
    assert watch.copies == []


@pytest.mark.parametrize(
    ("objective", "recompute"),
    cases([("sft", "none"), ("soar", "full")], ["none", "selective", "full"]),
)
def test_only_the_hosts_own_numbers_are_read(objective: str, recompute: str) -> None:
    watch = watched_step(objective, "cpu", recompute, "1f1b")
    assert set(watch.read) <= set(ON_THE_HOST), watch.read
    assert watch.read, "the watch sees nothing"


def test_the_watch_sees_what_waits() -> None:
    x = torch.arange(3.0)
    with Watch() as watch:
        x[x > 1]
        float(x.sum())
        x.nonzero()
        x[x > 1] = 0
        torch.arange(3).repeat_interleave(torch.tensor([1, 0, 2]))
        x.to("meta")
        x.to("meta", non_blocking=True)
    assert watch.read.total() >= 5
    assert len(watch.copies) == 1
    with pytest.raises(RuntimeError):
        float(torch.ones((), device="meta"))
