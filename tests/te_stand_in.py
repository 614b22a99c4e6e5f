"""A stand-in for Transformer Engine, which cannot even be constructed without CUDA.

``install`` puts it where the package would be. Every constructor and call is bound to the signature
recorded of the real one (tests/data/api/transformer_engine.json). It computes in the tensors' own
precision, on any device, what Transformer Engine 2.20 computes in FP8, and keeps its ways as read
in its source: weight caching by ``is_first_microbatch`` (a stale cache gives wrong numbers here,
too), ``main_grad`` overwritten by the first microbatch and added to by the others, the queue of
delayed weight gradients and what ``backward_dw`` does to the bias, tensor-parallel communication,
shape rules, and the histories of delayed scaling. It rounds nothing: numerics need a GPU.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from soar_mega.parallel.collectives import all_gather_into, reduce_scatter_into

API = Path(__file__).parent / "data" / "api" / "transformer_engine.json"
HISTORY = 4


@cache
def _recorded() -> dict[str, Any]:
    return json.loads(API.read_text())["api"]


def signature(name: str, part: str) -> inspect.Signature:
    """The recorded one; ``part`` is ``init``, ``forward``, ``call`` or ``fields``."""
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            kinds(
                one["name"],
                getattr(kinds, one.get("kind", "KEYWORD_ONLY")),
                default=one.get("default", kinds.empty),
            )
            for one in _recorded()[name][part]
        ]
    )


def bind(name: str, part: str, arguments: tuple[Any, ...], more: dict[str, Any]) -> dict[str, Any]:
    """What was given, by parameter; TypeError where the real one would not take it."""
    return signature(name, part).bind(*arguments, **more).arguments


class World:
    """What the real package keeps in globals, and what the tests look at.

    Attributes:
        calls: (what, facts) of every autocast, linear and checkpoint, in order.
        first: Whether the next linear with a graph is its autocast's first: its backward, the last
            of the pass, updates the histories of gradients.
        reduced: (direction, group) of each reduction of histories.
    """

    def __init__(self) -> None:
        self.autocast: list[SimpleNamespace] = []
        self.first = False
        self.linears: list[Linear] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.reduced: list[tuple[str, Any]] = []

    @property
    def recipe(self) -> Any:
        return self.autocast[-1].recipe if self.autocast and self.autocast[-1].enabled else None


WORLD = World()


def _gather(x: Tensor, group: Any) -> Tensor:
    out = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    all_gather_into(out, x.contiguous(), group=group)
    return out


def _scatter(x: Tensor, group: Any) -> Tensor:
    out = x.new_empty((x.shape[0] // dist.get_world_size(group), *x.shape[1:]))
    reduce_scatter_into(out, x.contiguous(), group=group)
    return out


def _reduce(x: Tensor, group: Any) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def _check_shapes(*tensors: Tensor) -> None:
    for x in tensors:
        if math.prod(x.shape[:-1]) % 16 or x.shape[-1] % 16:
            raise ValueError(f"FP8 execution requires multiples of 16, but got {tuple(x.shape)}")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, used: Tensor, call: Any
    ) -> Tensor:
        linear = call.linear
        total = _gather(x, linear.group) if linear.gathers else x
        out = F.linear(total, used, bias)
        if linear.mode == "row" and linear.ranks > 1:
            out = (_scatter if linear.sequence_parallel else _reduce)(out, linear.group)
        ctx.save_for_backward(x, used)
        ctx.weight, ctx.call, ctx.has_bias = weight, call, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, used = ctx.saved_tensors
        linear, fp8 = ctx.call.linear, ctx.call.fp8
        if linear.mode == "row" and linear.sequence_parallel:
            grad = _gather(grad, linear.group)
        total = _gather(x, linear.group) if linear.gathers else x
        dgrad = grad @ used
        if linear.mode == "column" and linear.ranks > 1:
            dgrad = (_scatter if linear.sequence_parallel else _reduce)(dgrad, linear.group)
        linear.note("scaling_bwd", grad, 0)
        weight, first = ctx.weight, ctx.call.first
        grad_NO, x_NI = grad.flatten(0, -2).detach(), total.flatten(0, -2).detach()
        bias_grad = grad_NO.sum(dim=0) if ctx.has_bias else None

        def product() -> Tensor | None:
            add = weight.main_grad.add_ if first is not True else weight.main_grad.copy_
            add(grad_NO.t() @ x_NI)
            return None if fp8 else bias_grad

        if linear.delayed:
            linear.queue.append(product)
        else:
            product()
        shown = bias_grad if fp8 or not linear.delayed else None
        if ctx.call.updates is not None:
            _update("scaling_bwd", 57344.0, *ctx.call.updates)
        return dgrad, None, shown, None, None


class Linear(nn.Module):
    """Stands in for ``te.Linear``."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__()
        given = bind("te.Linear", "init", arguments, more)
        WORLD.calls.append(("new linear", {k: v for k, v in given.items() if k.startswith("ub_")}))
        assert given["fuse_wgrad_accumulation"] and given["bias"]
        self.mode, self.group = given["parallel_mode"], given["tp_group"]
        self.ranks = given["tp_size"]
        assert (self.group is None) == (self.ranks == 1)
        assert self.mode in (None, "column", "row")
        self.sequence_parallel = given["sequence_parallel"] and self.ranks > 1
        self.gathers = self.mode == "column" and self.sequence_parallel
        inputs, outputs = given["in_features"], given["out_features"]
        outputs, left = divmod(outputs, self.ranks if self.mode == "column" else 1)
        inputs, more_left = divmod(inputs, self.ranks if self.mode == "row" else 1)
        assert not left and not more_left
        kind = {"dtype": given["params_dtype"], "device": given["device"]}
        self.weight = nn.Parameter(torch.full((outputs, inputs), torch.nan, **kind))
        self.bias = nn.Parameter(torch.zeros(outputs, **kind))
        given["init_method"](self.weight)
        self.delayed = given["delay_wgrad_compute"]
        self.queue: deque[Callable[[], Tensor | None]] = deque()
        self.fp8_meta: dict[str, Any] = {}
        self.ran = False
        self.workspace: tuple[Tensor, bool] | None = None
        WORLD.linears.append(self)

    def forward(self, *arguments: Any, **more: Any) -> Tensor:
        given = bind("te.Linear", "forward", arguments, more)
        x, first = given["inp"], given["is_first_microbatch"]
        recipe, graph = WORLD.recipe, torch.is_grad_enabled()
        WORLD.calls.append(
            ("linear", {"fp8": recipe is not None, "first": first, "grad": graph, "of": self})
        )
        if x.dtype != self.weight.dtype:
            raise TypeError(
                "Data types for parameters must match when outside of autocasted region"
            )
        used = self.weight.detach()
        if recipe is not None:
            _check_shapes(x, self.weight)
            if type(recipe).__name__ == "DelayedScaling":
                assert not self.sequence_parallel or recipe.reduce_amax
                self.fp8_meta.setdefault("num_gemms", 1)
                self.init_fp8_meta_tensors(recipe)
                self.ran = True
                self.note("scaling_fwd", x, 0)
            used = self._cached(first, graph)
        call = SimpleNamespace(linear=self, first=first, fp8=recipe is not None, updates=None)
        if recipe is not None and graph:
            if WORLD.first:
                call.updates = recipe, WORLD.autocast[-1].group
            WORLD.first = False
        apart = self.mode == "row"
        out: Tensor = _Product.apply(x, self.weight, None if apart else self.bias, used, call)
        return out + self.bias if apart else out

    def _cached(self, first: bool | None, graph: bool) -> Tensor:
        """The weight a pass computes with, as ``quantize_weight`` finds it."""
        fresh = self.weight.detach().clone()
        if first is None:
            return fresh
        if first or self.workspace is None:
            self.workspace = (fresh, graph)
        used, transposed = self.workspace
        assert transposed or not graph, "a blockwise cache made without gradient has no transpose"
        return used

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        count = self.fp8_meta["num_gemms"]
        for direction, tensors in (("scaling_fwd", 3 * count), ("scaling_bwd", 2 * count)):
            if direction not in self.fp8_meta:
                self.fp8_meta[direction] = SimpleNamespace(
                    scale=torch.ones(tensors), amax_history=torch.zeros(HISTORY, tensors)
                )

    def note(self, direction: str, x: Tensor, tensor: int) -> None:
        """What quantising does to the history, with or without gradient."""
        if direction in self.fp8_meta:
            cell = self.fp8_meta[direction].amax_history[0, tensor]
            cell.copy_(torch.maximum(cell, x.detach().abs().amax().float()))

    def backward_dw(self) -> None:
        if not self.delayed:
            return
        bias_grad: Any = self.queue.popleft()()
        if self.bias.grad is None:
            self.bias.grad = bias_grad.to(self.bias.dtype)


def _update(direction: str, largest: float, recipe: Any, group: Any) -> None:
    """Row 0 reduced and rolled into the history, a new scale, row 0 empty; nothing seen: as it is.

    Over all linears that have run, as they stand in the real one's global buffer.
    """
    if type(recipe).__name__ != "DelayedScaling":
        return
    if recipe.reduce_amax:
        WORLD.reduced.append((direction, group))
    for linear in WORLD.linears:
        if direction not in linear.fp8_meta or not linear.ran:
            continue
        state = linear.fp8_meta[direction]
        if recipe.reduce_amax:
            dist.all_reduce(state.amax_history[0], dist.ReduceOp.MAX, group=group)
        found = state.amax_history.amax(dim=0)
        good = (found > 0) & found.isfinite()
        state.scale.copy_(torch.where(good, largest / found.clamp(min=1e-12), state.scale))
        seen = state.amax_history[0] != 0
        state.amax_history[:, seen] = state.amax_history.roll(-1, 0)[:, seen]
        state.amax_history[0] = 0


@contextmanager
def autocast(*arguments: Any, **more: Any) -> Iterator[None]:
    given = bind("te.autocast", "call", arguments, more)
    enabled, recipe = given.get("enabled", True), given["recipe"]
    group = given.get("amax_reduction_group")
    WORLD.calls.append(("autocast", {"enabled": enabled, "recipe": recipe, "group": group}))
    WORLD.first = WORLD.first or not WORLD.autocast
    WORLD.autocast.append(SimpleNamespace(enabled=enabled, recipe=recipe, group=group))
    try:
        yield
    finally:
        WORLD.autocast.pop()
        if enabled and not WORLD.autocast and torch.is_grad_enabled():
            _update("scaling_fwd", 448.0, recipe, group)


def checkpoint(*arguments: Any, **more: Any) -> Any:
    given = bind("te.checkpoint", "call", arguments, more)
    options = given.get("kwargs", {})
    assert options == {"use_reentrant": False}
    function = given["function"]
    assert not isinstance(function, nn.Module), "would look for submodules of its own"
    recipe = WORLD.recipe
    WORLD.calls.append(("checkpoint", {"fp8": recipe is not None}))

    def contexts() -> tuple[Any, Any]:
        if recipe is None:
            return nullcontext(), nullcontext()
        return nullcontext(), autocast(enabled=True, recipe=recipe)

    return torch_checkpoint(
        function,
        *given["args"],
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
    )


class RMSNorm(nn.Module):
    """Stands in for ``te.RMSNorm``."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__()
        given = bind("te.RMSNorm", "init", arguments, more)
        self.shape, self.eps = tuple(given["normalized_shape"]), given["eps"]
        kind = {"dtype": given["params_dtype"], **given["kwargs"]}
        self.weight = nn.Parameter(torch.ones(self.shape, **kind))

    def forward(self, *arguments: Any, **more: Any) -> Tensor:
        x = bind("te.RMSNorm", "forward", arguments, more)["input"]
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class DotProductAttention(nn.Module):
    """Stands in for ``te.DotProductAttention``."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__()
        given = bind("te.DotProductAttention", "init", arguments, more)
        assert given["attn_mask_type"] == "no_mask"
        assert given["qkv_format"] == "sbhd"
        assert given["attention_dropout"] == 0.0
        self.heads, self.width = given["num_attention_heads"], given["kv_channels"]
        self.scale = given["softmax_scale"]

    def forward(self, *arguments: Any, **more: Any) -> Tensor:
        given = bind("te.DotProductAttention", "forward", arguments, more)
        q, k, v = (given[f"{name}_layer"] for name in ("query", "key", "value"))
        assert q.shape[-2:] == k.shape[-2:] == v.shape[-2:] == (self.heads, self.width)
        out = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (q, k, v)), scale=self.scale
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _recipe(name: str) -> type:
    def init(self: Any, **more: Any) -> None:
        bind(f"recipe.{name}", "fields", (), more)
        self.__dict__.update({"reduce_amax": True, **more})

    return type(name, (), {"__init__": init})


def initialize_ub(*arguments: Any, **more: Any) -> None:
    """Stands in for ``te.module.base.initialize_ub``."""
    WORLD.calls.append(("buffers", bind("te.module.base.initialize_ub", "call", arguments, more)))


def _available(*arguments: Any, **more: Any) -> Any:
    assert bind("te.is_fp8_available", "call", arguments, more) == {"return_reason": True}
    return True, ""


def modules() -> dict[str, ModuleType]:
    """The packages, by name."""
    names = (
        "transformer_engine",
        "transformer_engine.pytorch",
        "transformer_engine.pytorch.module",
        "transformer_engine.pytorch.module.base",
        "transformer_engine.common",
        "transformer_engine.common.recipe",
    )
    found = {name: ModuleType(name) for name in names}
    for name, module in found.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, module)
    pytorch = found["transformer_engine.pytorch"]
    for part in (Linear, RMSNorm, DotProductAttention, autocast, checkpoint):
        setattr(pytorch, part.__name__, part)
    for kind in ("fp8", "mxfp8", "fp8_block_scaling"):
        setattr(pytorch, f"is_{kind}_available", _available)
    base = found["transformer_engine.pytorch.module.base"]
    base.initialize_ub = initialize_ub
    base.UserBufferQuantizationMode = SimpleNamespace(FP8="fp8", NONE="none")
    recipes = found["transformer_engine.common.recipe"]
    for name in _recorded():
        if name.startswith("recipe."):
            setattr(recipes, name.removeprefix("recipe."), _recipe(name.removeprefix("recipe.")))
    return found


def install(monkeypatch: pytest.MonkeyPatch) -> World:
    """Until ``monkeypatch`` is undone; returns a fresh world."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    WORLD.__init__()  # type: ignore[misc]
    return WORLD
