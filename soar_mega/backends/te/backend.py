"""``TEBackend``: FP8 linears of the blocks through Transformer Engine, the rest in bf16.

What stays in bf16: adaLN, time and pooled MLPs (a row per sample: too few for FP8's shape rules),
embeddings and output, attention's own products, and the blocks the configuration names.

Legend: L query tokens, S key tokens, B samples, D width, H heads, d head width.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from soar_mega.backends import Backend, Overlap, WeightWork
from soar_mega.backends.elementwise import Elementwise
from soar_mega.backends.te.linear import StepState, TELinear
from soar_mega.backends.te.overlap import Mode
from soar_mega.backends.te.recipes import RecipeName, make_recipe, multiple_of
from soar_mega.backends.te.scaling import Scaling, untouched
from soar_mega.backends.te.statistics import E4M3, E5M2, Statistics
from soar_mega.backends.torch import TorchBackend
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh, ProcessGroup

_PLAIN = Elementwise()


class TEBackend:
    """See ``Backend``. One per process: its stages share its idea of a step.

    Args:
        recipe: Of FP8; None: Transformer Engine in bf16.
        bf16_layers: Blocks whose linears stay in bf16, by number in the model.
        split_backwards: Whether the schedule splits backwards; then it must split all of them.
        amax_group: Delayed scaling takes the largest magnitudes over these processes, which run the
            same passes; None: each for itself.
        elementwise: What the model does between linears.
        overlaps: Whether tensor-parallel communication runs beside products; ``overlap.start`` has
            been called then.

    Attributes:
        recipe: The recipe object of ``recipe``.
        amax_group: As given.
    """

    name = "te"

    def __init__(
        self,
        recipe: RecipeName | None,
        *,
        bf16_layers: Collection[int] = (),
        split_backwards: bool = False,
        amax_group: ProcessGroup | None = None,
        elementwise: Elementwise = _PLAIN,
        overlaps: bool = False,
    ) -> None:
        self._te = importlib.import_module("transformer_engine.pytorch")
        self._plain = TorchBackend()
        self.elementwise, self._overlaps = elementwise, overlaps
        self._bf16_layers, self._split_backwards = frozenset(bf16_layers), split_backwards
        self._keeps_history, self.amax_group = recipe == "delayed", amax_group
        self._gradient_format = E5M2 if recipe in ("current", "delayed") else E4M3
        self.recipe: Any = None
        if recipe is not None:
            self.recipe = make_recipe(recipe, reduce_amax=amax_group is not None)
        self.token_multiple = multiple_of(recipe)
        self._step, self._linears = StepState(), list[TELinear]()
        self._statistics: Statistics | None = None
        self._before: Scaling | None = None  # the last step, of delayed scaling
        self._attentions: dict[tuple[int, int], Any] = {}

    def for_layer(self, layer: int) -> Backend:
        return self._plain if layer in self._bf16_layers else self

    def column_linear(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        *,
        sequence_parallel: bool,
        overlap: Overlap | None = None,
    ) -> nn.Module:
        return self._linear(weight, bias, mesh, "column", sequence_parallel, overlap)

    def row_linear(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        *,
        sequence_parallel: bool,
        overlap: Overlap | None = None,
    ) -> nn.Module:
        return self._linear(weight, bias, mesh, "row", sequence_parallel, overlap)

    def _linear(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        mode: Mode,
        sequence_parallel: bool,
        overlap: Overlap | None,
    ) -> TELinear:
        linear = TELinear(
            weight,
            bias,
            mesh,
            self._step,
            mode=mode,
            sequence_parallel=sequence_parallel,
            delayed=self._split_backwards,
            recipe=self.recipe,
            overlap=overlap if self._overlaps else None,
        )
        self._linears.append(linear)
        return linear

    def linear(self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh) -> nn.Module:
        return self._plain.linear(weight, bias, mesh)

    def rms_norm(self, weight: ParameterLayout, mesh: Mesh, eps: float) -> nn.Module:
        norm = self._te.RMSNorm(
            weight.local_shape(mesh.tensor_size),
            eps=eps,
            params_dtype=torch.float32,
            device=mesh.device,
        )
        norm.weight.parallel_layout = weight
        return norm

    def attention(self, q_LBHd: Tensor, k_SBHd: Tensor, v_SBHd: Tensor) -> Tensor:
        heads, width = q_LBHd.shape[-2:]
        if (heads, width) not in self._attentions:
            self._attentions[heads, width] = self._te.DotProductAttention(
                heads,
                width,
                attention_dropout=0.0,
                qkv_format="sbhd",
                attn_mask_type="no_mask",
                softmax_scale=1.0 / math.sqrt(width),
            )
        out: Tensor = self._attentions[heads, width](q_LBHd, k_SBHd, v_SBHd)
        return out

    @contextmanager
    def precision(self) -> Iterator[None]:
        if self.recipe is None:
            yield
            return
        with self._te.autocast(
            enabled=True, recipe=self.recipe, amax_reduction_group=self.amax_group
        ):
            if self._keeps_history and not torch.is_grad_enabled():
                with untouched(self._linears):
                    yield
            else:
                yield

    def checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        # A partial, since of a module it looks for its own submodules and, finding none, would
        # recompute without its precision; not reentrant, which would want a graph of its own.
        return self._te.checkpoint(partial(function), *inputs, use_reentrant=False)

    @contextmanager
    def hold_weight_gradients(self) -> Iterator[WeightWork]:
        # One queue for the linears of both kinds, in the order of the backward.
        with self._plain.hold_weight_gradients() as held:
            self._step.held = held
            try:
                yield held
            finally:
                self._step.held = None

    @contextmanager
    def training_step(self, watch: bool) -> Iterator[None]:
        step = self._step
        step.number += 1
        self._statistics = step.statistics = (
            Statistics(self._gradient_format) if watch and self.recipe else None
        )
        if self._keeps_history:
            self._before = Scaling(self._linears)
        step.training = True
        try:
            yield
        finally:
            step.training, step.statistics = False, None

    def forget_step(self) -> None:
        if self._before is not None:
            self._before.put_back()

    def statistics(self) -> dict[str, Tensor]:
        return {} if self._statistics is None else self._statistics.largest()
