"""Whose AdamW a run uses: the calls into apex and Transformer Engine, and what is refused.

Neither runs without CUDA, so stand-ins take their place: each binds the constructor's call to the
signature recorded of the real class, and updates as its source says it does, in plain torch.
``tests/gpu`` compares the real ones.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from soar_mega.config import ConfigError
from soar_mega.config.schema import OptimizerConfig
from soar_mega.training.optimizer import ShardOptimizer, check_optimizer
from tests.runs import REPOSITORY, Tiny, command

API = REPOSITORY / "tests" / "data" / "api"
MODULES = {
    "apex_fused_adam": ("apex.json", "apex.optimizers.FusedAdam", "apex.optimizers"),
    "te_fused_adam": (
        "transformer_engine.json",
        "te.optimizers.FusedAdam",
        "transformer_engine.pytorch.optimizers",
    ),
}
OTHERS = {
    "learning_rate": 3e-3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.1,
}


def recorded(name: str) -> inspect.Signature:
    """The constructor's."""
    file, key, _ = MODULES[name]
    parameters = json.loads((API / file).read_text())["api"][key]["init"]
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            kinds(
                one["name"],
                getattr(kinds, one.get("kind", "POSITIONAL_OR_KEYWORD")),
                default=one.get("default", kinds.empty),
            )
            for one in parameters
        ]
    )


def stand_in(name: str) -> type[torch.optim.Optimizer]:
    """A class that takes what the real one takes."""
    signature = recorded(name)

    class StandInFusedAdam(torch.optim.Optimizer):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            given = signature.bind(*arguments, **more).arguments
            assert given["adam_w_mode"] is True
            super().__init__(
                given["params"],
                {key: given[key] for key in ("lr", "betas", "eps", "weight_decay")},
            )

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                beta1, beta2 = group["betas"]
                for parameter in group["params"]:
                    state, gradient = self.state[parameter], parameter.grad
                    assert state["exp_avg"].dtype == torch.float32
                    state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
                    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                    mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                    square = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                    change = mean / (square.sqrt() + group["eps"])
                    change += group["weight_decay"] * parameter
                    parameter -= group["lr"] * change

    return StandInFusedAdam


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(name: str) -> None:
        module = ModuleType(MODULES[name][2])
        module.FusedAdam = stand_in(name)  # type: ignore[attr-defined]
        for part in ("apex", "transformer_engine", "transformer_engine.pytorch"):
            package = ModuleType(part)
            package.__spec__ = importlib.machinery.ModuleSpec(part, None, is_package=True)
            package.__path__ = []
            monkeypatch.setitem(sys.modules, part, package)
        monkeypatch.setitem(sys.modules, MODULES[name][2], module)

    return install


def updates(
    optimizer: ShardOptimizer, count: int, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    for number in range(first, first + count):
        draw = torch.Generator().manual_seed(number)
        optimizer.update(torch.randn(1000, generator=draw), lr=1e-2 / (number + 1))
    return optimizer._parameter.detach(), optimizer.exp_avg, optimizer.exp_avg_sq


def fresh(name: str) -> ShardOptimizer:
    start = torch.randn(1000, generator=torch.Generator().manual_seed(99))
    return ShardOptimizer(start, OptimizerConfig(name=name, **OTHERS))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODULES)
def test_the_call_fits_and_the_update_is_torchs(
    name: str, installed: Callable[[str], None]
) -> None:
    installed(name)
    fused = fresh(name)
    for got, expected in zip(updates(fused, 5), updates(fresh("adamw"), 5), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert fused.step == 5


@pytest.mark.parametrize("name", MODULES)
def test_goes_on_from_torchs_state(name: str, installed: Callable[[str], None]) -> None:
    installed(name)
    one, other = fresh("adamw"), fresh(name)
    state = updates(one, 3)
    for target, source in zip(
        (other._parameter.data, other.exp_avg, other.exp_avg_sq), state, strict=True
    ):
        target.copy_(source)
    other.step = one.step
    for got, expected in zip(updates(other, 2, 3), updates(one, 2, 3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert other.step == 5


@pytest.mark.parametrize("name", MODULES)
def test_what_is_not_installed_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer.name = {name} needs .*, or use .*adamw"):
        check_optimizer(OptimizerConfig(name=name), torch.device("cuda"))  # type: ignore[arg-type]


def test_what_needs_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soar_mega.training.optimizer.is_there", lambda name: True)
    config = OptimizerConfig(name="apex_fused_adam")
    with pytest.raises(ConfigError, match="runs on CUDA, but this run is on cpu"):
        check_optimizer(config, torch.device("cpu"))
    check_optimizer(config, torch.device("cuda"))


def test_the_command_refuses_before_it_writes(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert command(tiny.arguments("sft", run, "optimizer.name=te_fused_adam")) == 78
    assert "Transformer Engine, which is not installed" in capsys.readouterr().err
    assert not run.exists()
