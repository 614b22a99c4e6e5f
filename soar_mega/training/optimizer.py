"""AdamW on this rank's share of the flat parameters, its learning rate, and the averaged weights.

All of it works on one 1-D fp32 tensor per process (see ``parallel.sharded``), so it costs a handful
of kernels whatever the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from soar_mega.config.schema import OptimizerConfig


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


class ShardOptimizer:
    """torch's fused AdamW over the master share; its moments are plain tensors from the start.

    Attributes:
        exp_avg, exp_avg_sq: Adam's moments, same shape as the share.
        step: Updates made.
    """

    def __init__(self, master_shard: Tensor, config: OptimizerConfig) -> None:
        self._parameter = nn.Parameter(master_shard)
        self._adam = torch.optim.AdamW(
            [self._parameter],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.exp_avg = torch.zeros_like(master_shard)
        self.exp_avg_sq = torch.zeros_like(master_shard)
        self._updates = torch.zeros((), dtype=torch.float32, device=master_shard.device)
        self._adam.state[self._parameter] = {
            "step": self._updates,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }

    def update(self, gradient_shard: Tensor, lr: float) -> None:
        """One AdamW update of the master share, in place."""
        self._parameter.grad = gradient_shard
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()
        self._parameter.grad = None

    @property
    def step(self) -> int:
        """Updates made so far."""
        return int(self._updates)

    @step.setter
    def step(self, value: int) -> None:
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
