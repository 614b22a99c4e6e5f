"""A linear layer of Transformer Engine with this project's parameters and its order of a step.

Legend: L tokens, B samples, I input features, O output features; ``x_lBI`` is one tensor rank's
share of the tokens with sequence parallel, all of them without.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from soar_mega.backends import Overlap, WeightWork
from soar_mega.backends.te.overlap import Mode, overlap_options
from soar_mega.backends.te.statistics import Statistics
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh


class StepState:
    """What the linears of a backend have in common at one moment.

    Attributes:
        number: Of the training step; counts up.
        training: Whether a training step is under way, within which weights do not change.
        statistics: Where to note what the first pass sees; None: nowhere.
        held: Weight gradients that the backward under way leaves undone; None outside of one.
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self.statistics: Statistics | None = None
        self.held: WeightWork | None = None


class TELinear(nn.Module):
    """``te.Linear``, column- or row-parallel, its weight gradient added into ``main_grad``.

    The FP8 weight is cached from the first pass with gradient of a training step on; that pass's
    weight gradient overwrites ``main_grad``, so it must be the step's first on this layer, which
    every schedule keeps (``pipeline.validator``). A pass without gradient before it, and every pass
    outside of a training step (validation, sampling), casts the weight anew and caches nothing.

    Args:
        weight, bias: Layouts, as for every backend.
        mesh: Where this process stands.
        step: Shared by the backend's layers.
        mode: Which features are cut over the tensor ranks.
        sequence_parallel: Whether tokens are, between layers.
        delayed: Whether weight gradients are always left to ``backward_dw``.
        recipe: The recipe object of FP8; None: bf16.
        overlap: Whose communication buffers to use (see ``overlap``); None: none.
    """

    def __init__(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        step: StepState,
        *,
        mode: Mode,
        sequence_parallel: bool,
        delayed: bool,
        recipe: Any,
        overlap: Overlap | None,
    ) -> None:
        super().__init__()
        te = importlib.import_module("transformer_engine.pytorch")
        *rows, inputs = weight.local_shape(mesh.tensor_size)
        outputs, ranks = math.prod(rows), mesh.tensor_size
        cut = ranks > 1
        linear = te.Linear(
            inputs * (ranks if mode == "row" else 1),
            outputs * (ranks if mode == "column" else 1),
            sequence_parallel=sequence_parallel and cut,
            fuse_wgrad_accumulation=True,
            tp_group=mesh.tensor_group,
            tp_size=ranks,
            bias=True,
            params_dtype=torch.float32,
            # Of a row-parallel layer the bias is added apart, even on one rank.
            parallel_mode=mode if cut else None,
            init_method=_leave,
            device=mesh.device,
            delay_wgrad_compute=delayed,
            **({} if overlap is None else overlap_options(mode, overlap)),
        )
        # Not a submodule: parameters have the names they have on every backend.
        self._linear = (linear,)
        self.weight, self.bias = linear.weight, linear.bias
        for parameter, layout in ((self.weight, weight), (self.bias, bias)):
            parameter.parallel_layout = layout
            with torch.no_grad():
                parameter.zero_()  # padded heads stay so
        self._step, self._delayed, self.recipe = step, delayed, recipe
        # Where the gradient of the bias comes out of the weight gradient's product.
        self._bias_with_weight = recipe is None and not (mode == "row" and cut)
        self._no_gradient: Tensor | None = None
        self._seen = 0

    @property
    def inner(self) -> Any:
        """The ``te.Linear``."""
        return self._linear[0]

    def forward(self, x_lBI: Tensor) -> Tensor:
        step, first = self._step, self._is_first()
        watching = step.statistics if first else None
        if watching is not None:
            watching.note_input(x_lBI, self._scale("scaling_fwd"))
        out: Tensor = self.inner(x_lBI, is_first_microbatch=first)
        if out.requires_grad and watching is not None:
            out.register_hook(
                lambda gradient: watching.note_gradient(gradient, self._scale("scaling_bwd"))
            )
        if out.requires_grad and self._delayed:
            out.register_hook(self._leave_undone)
        return out

    def _is_first(self) -> bool | None:
        """Transformer Engine's ``is_first_microbatch``."""
        step = self._step
        if not step.training:
            return None
        if self._seen == step.number:
            return False
        if not torch.is_grad_enabled():
            return None
        self._seen = step.number
        return True

    def _scale(self, direction: str) -> Tensor | None:
        """Of delayed scaling: what the next input, or output gradient, is multiplied by."""
        scale = getattr(self.inner.fp8_meta.get(direction), "scale", None)
        return None if scale is None else scale[0].clone()

    def _leave_undone(self, _gradient: Tensor) -> None:
        if self._step.held is None:
            raise RuntimeError(
                "this backend was made for schedules that split backwards, and this backward is a "
                "whole one"
            )
        self._step.held.append(self.backward_dw)

    def backward_dw(self) -> None:
        """The oldest weight gradient that is left, into ``main_grad``."""
        bias: Any = self.bias
        if not self._bias_with_weight:
            # Already there by autograd. Transformer Engine would write the product's, which there
            # is none of, into an empty ``grad``.
            if self._no_gradient is None:
                self._no_gradient = torch.zeros_like(bias)
            bias.grad = self._no_gradient
        self.inner.backward_dw()
        if self._bias_with_weight:
            bias.main_grad.add_(bias.grad)
        bias.grad = None


def _leave(weight: Tensor) -> None:
    """Weights are filled later, whatever they are filled from."""
