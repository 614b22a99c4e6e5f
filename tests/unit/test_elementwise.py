"""The functions between linears: what they are in formulas, and compiled as plain.

Legend: L tokens, B samples, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.backends.elementwise import Elementwise

EPS = 1e-6
CASES = ("modulated_norm", "twice_modulated_norm", "gated_add", "gelu")


def compiled(backend: str) -> Elementwise:
    torch._dynamo.reset()
    return Elementwise.compiled(backend=backend)


def inputs(L: int, B: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(L)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    D = 32
    vectors = {name: draw(B, D) for name in ("scale", "shift", "scale2", "shift2", "gate")}
    return {"x": draw(L, B, D), "y": draw(L, B, D), **vectors}


def call(functions: Elementwise, name: str, of: dict[str, Tensor]) -> tuple[Tensor, ...]:
    calls: dict[str, Callable[[], Any]] = {
        "modulated_norm": lambda: functions.modulated_norm(of["x"], of["scale"], of["shift"], EPS),
        "twice_modulated_norm": lambda: functions.twice_modulated_norm(
            of["x"], (of["scale"], of["shift"]), (of["scale2"], of["shift2"]), EPS
        ),
        "gated_add": lambda: functions.gated_add(of["x"], of["gate"], of["y"]),
        "gelu": lambda: functions.gelu(of["x"]),
    }
    out = calls[name]()
    return out if isinstance(out, tuple) else (out,)


def results(functions: Elementwise, name: str, of: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of a sum that weighs every element differently."""
    outs = call(functions, name, of)
    for x in of.values():
        x.grad = None
    weights = torch.linspace(-1, 1, outs[0].numel()).view(outs[0].shape)
    loss = sum((k + 1) * (weights * out.float()).sum() for k, out in enumerate(outs))
    loss.backward()  # type: ignore[union-attr]
    gradients = [x.grad for x in of.values() if x.grad is not None]
    return [x.detach() for x in outs] + gradients


def test_plain_functions_are_their_formulas() -> None:
    of, plain = inputs(5, 3), Elementwise()
    x, scale, shift = (of[name] for name in ("x", "scale", "shift"))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    expected = normed * (1 + scale) + shift
    second = normed * (1 + of["scale2"]) + of["shift2"]
    torch.testing.assert_close(call(plain, "modulated_norm", of), (expected,))
    torch.testing.assert_close(call(plain, "twice_modulated_norm", of), (expected, second))
    torch.testing.assert_close(call(plain, "gated_add", of), (x + of["gate"] * of["y"],))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    torch.testing.assert_close(call(plain, "gelu", of), (0.5 * x * (1 + inner.tanh()),))


@pytest.mark.full  # Inductor's C++ compiler takes seconds for each function, direction and shape
@pytest.mark.parametrize("name", CASES)
def test_compiled_functions_equal_the_plain_ones(name: str) -> None:
    functions = compiled("inductor")
    for L, B in ((16, 2), (9, 2), (16, 6)):  # image, text, an auxiliary group
        assert_same(functions, name, inputs(L, B))


def test_one_kernel_of_inductor_equals_its_plain_function() -> None:
    assert_same(compiled("inductor"), "modulated_norm", inputs(16, 2))


def assert_same(functions: Elementwise, name: str, of: dict[str, Tensor]) -> None:
    got, expected = results(functions, name, of), results(Elementwise(), name, of)
    assert len(got) == len(expected) > 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for a, b in zip(call(functions, name, of), expected, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_functions_are_compiled_for_the_first_shapes_and_then_no_more() -> None:
    functions = compiled("aot_eager")

    def every(shapes: list[tuple[int, int]]) -> None:
        for L, B in shapes:
            for name in CASES:
                assert_same(functions, name, inputs(L, B))

    every([(16, 2), (9, 2), (16, 6), (9, 6)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        every([(16, 2), (9, 2), (16, 6), (9, 6), (25, 4), (12, 3)])
