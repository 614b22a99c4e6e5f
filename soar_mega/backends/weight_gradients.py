"""Linear layers whose backward adds the weight gradient into ``main_grad``, now or later.

The plain way makes the whole gradient as a new tensor first and adds it after. Autograd gets no
gradient of these parameters, so those without ``main_grad`` take the plain way.

Python's side effects are nothing that torch.compile can trace. In a compiled block the backward of
a linear is therefore one opaque operator, which gives the gradient of the input and adds, or holds,
that of the weight behind the compiler's back. It is told the weight and a number for the backend,
never one for the layer: a number that differs from block to block would mean a graph for each.

Legend: N tokens times samples, I input features, O output features; ``x``, ``grad`` with any
leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soar_mega.backends import WeightWork

_numbers = count()
_by_number: WeakValueDictionary[int, WeightGradients] = WeakValueDictionary()


class WeightGradients:
    """Does weight gradients at once, or holds them for later; one a backend.

    Attributes:
        number: By which compiled code finds it.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        _by_number[self.number] = self
        self._held: WeightWork | None = None
        self._linears: WeakSet[nn.Module] = WeakSet()
        self._by_address: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()

    @contextmanager
    def hold(self) -> Iterator[WeightWork]:
        """See ``Backend.hold_weight_gradients``."""
        held: WeightWork = []
        self._held = held
        try:
            yield held
        finally:
            self._held = None

    @property
    def holding(self) -> bool:
        """Whether a backward's weight gradients are left for later."""
        return self._held is not None

    def do(self, work: Callable[[], None]) -> None:
        """Do ``work`` now or later."""
        if self._held is None:
            work()
        else:
            self._held.append(work)

    def add(self, linear: nn.Module) -> None:
        """Make a module with ``weight`` and ``bias`` known to ``parameters``."""
        self._linears.add(linear)

    def parameters(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias parameters of the linear whose weight's memory this is.

        Compiled code has no Parameters, only tensors over their memory.

        Raises:
            RuntimeError: No linear of this backend has it.
        """
        address = weight.data_ptr()
        linear = self._by_address.get(address)
        # Weights move when they enter the flat buffer or change their dtype.
        if linear is None or linear.weight.data_ptr() != address:  # type: ignore[operator]
            self._by_address.clear()
            for each in self._linears:
                self._by_address[each.weight.data_ptr()] = each  # type: ignore[operator]
            linear = self._by_address.get(address)
        if linear is None:
            raise RuntimeError(
                f"a compiled backward has a weight of shape {tuple(weight.shape)} that is no "
                "linear layer's of its backend: the compiler must pass weights on as they are"
            )
        return linear.weight, linear.bias  # type: ignore[return-value]


@torch.no_grad()  # also where it runs later, outside a backward
def _add_gradients(x: Tensor, grad: Tensor, weight: Any, bias: Any) -> None:
    """Add a linear layer's weight and bias gradients into their ``main_grad``."""
    grad_NO, x_NI = grad.flatten(0, -2), x.flatten(0, -2)
    if weight.main_grad.dtype == grad.dtype:
        weight.main_grad.addmm_(grad_NO.t(), x_NI)
    else:
        weight.main_grad.add_(grad_NO.t() @ x_NI)
    if bias is not None:
        bias.main_grad.add_(grad_NO.sum(dim=0))


def adding_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gradients: WeightGradients
) -> Tensor:
    """``x weight^T + bias``, whose backward adds into ``main_grad``.

    Args:
        x: ``(..., I)``.
        weight: ``(O, I)`` with ``main_grad``, of a linear known to ``gradients``.
        bias: ``(O,)`` with ``main_grad``, the linear's, or None.
        gradients: Does or holds the work.
    """
    result: Tensor
    if torch.compiler.is_compiling():
        result = _TracedLinear.apply(x, weight, bias, gradients.number)
    else:
        result = _AddingLinear.apply(x, weight, bias, gradients)
    return result


class _AddingLinear(torch.autograd.Function):
    """As it runs without a compiler."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradients: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved as tensors: recomputation would hand back copies without main_grad.
        ctx.weight, ctx.bias, ctx.gradients = weight, bias, gradients
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        # Detached: work that waits must not keep the graph behind its input alive.
        ctx.gradients.do(partial(_add_gradients, x.detach(), grad, ctx.weight, ctx.bias))
        return grad @ ctx.weight if ctx.needs_input_grad[0] else None, None, None, None


class _TracedLinear(torch.autograd.Function):
    """As a compiler sees it: only the backward is opaque."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.number = bias is not None, number
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        # The input's gradient is part of the result because what has no used result is eliminated;
        # every input of a block has a gradient.
        return _linear_backward(grad, x, weight, ctx.has_bias, ctx.number), None, None, None


@torch.library.custom_op("soar_mega::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, number: int
) -> Tensor:
    gradients = _by_number[number]
    own_weight, own_bias = gradients.parameters(weight)
    if gradients.holding:
        # The compiler plans memory without knowing that someone still looks at these two.
        x, grad = x.clone(), grad.clone()
    gradients.do(partial(_add_gradients, x, grad, own_weight, own_bias if has_bias else None))
    return grad @ weight


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, number: int) -> Tensor:
    return grad.new_empty(x.shape)
