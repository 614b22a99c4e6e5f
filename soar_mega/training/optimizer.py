"""AdamW on this rank's share of the flat parameters, its learning rate, and the averaged weights.

All of it works on one 1-D fp32 tensor per process (see ``parallel.sharded``), so it costs a handful
of kernels whatever the model.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from soar_mega.config import ConfigError
from soar_mega.config.schema import OptimizerConfig
from soar_mega.launch.optional import OPTIONAL, is_there

# optimizer.name -> package and module of its FusedAdam.
_FUSED = {
    "apex_fused_adam": ("apex", "apex.optimizers"),
    "te_fused_adam": ("transformer_engine", "transformer_engine.pytorch.optimizers"),
}


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then the chosen course."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    span = max(max_steps - config.lr_warmup_steps, 1)
    done = min((step - config.lr_warmup_steps) / span, 1.0)
    left = 1.0 - done if config.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * (config.lr_min_ratio + (1.0 - config.lr_min_ratio) * left)


def package_of(config: OptimizerConfig) -> str | None:
    """The optional package that the chosen AdamW is in."""
    return None if config.name == "adamw" else _FUSED[config.name][0]


def check_optimizer(config: OptimizerConfig, device: torch.device) -> None:
    """Refuse an AdamW that cannot run here.

    Raises:
        ConfigError: Its package is not installed, or there is no CUDA.
    """
    package = package_of(config)
    if package is None:
        return
    if not is_there(package):
        shown, way = OPTIONAL[package]
        made = f"{_FUSED[config.name][1]}.FusedAdam"
        raise ConfigError(
            f"optimizer.name = {config.name} needs {made} of {shown}, which is not "
            f"installed: {way}, or use optimizer.name = adamw"
        )
    if device.type != "cuda":
        raise ConfigError(
            f"optimizer.name = {config.name} runs on CUDA, but this run is on {device.type} "
            "(run.device): use optimizer.name = adamw"
        )


class ShardOptimizer:
    """AdamW over the master share; its moments are plain tensors from the start.

    torch, apex and Transformer Engine compute the same update with the same state (decoupled weight
    decay, bias correction, epsilon added after it), so a run may go on with another of them.

    Attributes:
        exp_avg, exp_avg_sq: Adam's moments, same shape as the share.
        step: Updates made.
    """

    def __init__(self, master_shard: Tensor, config: OptimizerConfig) -> None:
        self._parameter = nn.Parameter(master_shard)
        self.exp_avg = torch.zeros_like(master_shard)
        self.exp_avg_sq = torch.zeros_like(master_shard)
        state = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        make: Any = torch.optim.AdamW
        more: dict[str, Any] = {"fused": True}
        if config.name != "adamw":
            make = importlib.import_module(_FUSED[config.name][1]).FusedAdam
            more = {"adam_w_mode": True}
        self._adam = make(
            [self._parameter],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            **more,
        )
        self._group = self._adam.param_groups[0]
        # torch counts on the device, the other two in the group.
        self._updates: Tensor | None = None
        if config.name == "adamw":
            self._updates = torch.zeros((), dtype=torch.float32, device=master_shard.device)
            state["step"] = self._updates
        else:
            self._group["step"] = 0
        self._adam.state[self._parameter] = state

    def update(self, gradient_shard: Tensor, lr: float) -> None:
        """One AdamW update of the master share, in place."""
        self._parameter.grad = gradient_shard
        self._group["lr"] = lr
        self._adam.step()
        self._parameter.grad = None

    @property
    def step(self) -> int:
        """Updates made so far."""
        return int(self._group["step"] if self._updates is None else self._updates)

    @step.setter
    def step(self, value: int) -> None:
        if self._updates is None:
            self._group["step"] = value
        else:
            self._updates.fill_(value)


class ShardEMA:
    """Exponential moving average of the master share.

    The decay of update n (from 1) is at most n / (9 + n), and 0 for the first, so that the average
    forgets the start quickly (as in diffusers' ``EMAModel``).
    """

    def __init__(self, master_shard: Tensor, decay: float) -> None:
        self.shard = master_shard.clone()
        self._decay = decay

    def update(self, master_shard: Tensor, updates: int) -> None:
        """Fold in the weights after update number ``updates`` (from 1)."""
        decay = min(self._decay, updates / (9 + updates)) if updates > 1 else 0.0
        self.shard.lerp_(master_shard, 1.0 - decay)
