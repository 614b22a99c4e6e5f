"""What a pass costs on a stage, found by running the stage on the meta device: shapes, no numbers.

Nothing here is a formula for the model's activations: a torch dispatch mode watches which memory a
forward makes, what of it is still held when the forward is over, how much more a backward needs for
a while, and what one that leaves weight gradients for later still holds when it is over. So
recomputation, sequence parallelism and whatever a block does are counted as they are.

Legend: L query tokens, S key tokens, B rows, H heads, d head width.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soar_mega.backends.torch import TorchBackend
from soar_mega.model.payload import PassSize, Payload
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import ParameterLayout, new_parameter
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import ModelInput, TextCondition

_aten = torch.ops.aten


@dataclass(frozen=True)
class PassCosts:
    """One pass of one microbatch through a stage.

    Attributes:
        kept: Bytes held from the forward until the backward: what autograd keeps, the received
            payload and the output.
        held: Bytes held from an input backward until its weight gradients are done: of every linear
            the input, recomputed or not, the gradient of the output, and what their graph still
            ties to them.
        working: Most bytes in use beyond ``kept`` at any moment of forward and backward; of a pass
            without gradient all, the received payload too.
        split_working: The same where the backward is split: beyond ``kept`` in the forward, beyond
            the larger of ``kept`` and ``held`` in the input backward, beyond ``held`` after it.
        forward_sent, backward_sent: Bytes a tensor-parallel rank sends (ring collectives).
    """

    kept: int
    held: int
    working: int
    split_working: int
    forward_sent: float
    backward_sent: float


class GpuBackend(TorchBackend):
    """The torch backend as CUDA runs it: flash attention and a fused RMS norm, shapes only.

    On the meta device torch composes both of many operations, and keeps what each needs.
    """

    def rms_norm(self, weight: ParameterLayout, mesh: Mesh, eps: float) -> nn.Module:
        return _RMSNorm(weight, mesh)

    def attention(self, q_LBHd: Tensor, k_SBHd: Tensor, v_SBHd: Tensor) -> Tensor:
        q_BHLd, k_BHSd, v_BHSd = (x.permute(1, 2, 0, 3) for x in (q_LBHd, k_SBHd, v_SBHd))
        out_BHLd: Tensor = _aten._scaled_dot_product_flash_attention.default(
            q_BHLd, k_BHSd, v_BHSd, scale=1.0 / math.sqrt(q_LBHd.shape[-1])
        )[0]
        return out_BHLd.permute(2, 0, 1, 3).flatten(2)


class _RMSNorm(nn.Module):
    def __init__(self, weight: ParameterLayout, mesh: Mesh) -> None:
        super().__init__()
        self.weight = new_parameter(weight, mesh)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _FusedRMSNorm.apply(x, self.weight)
        return result


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, scale, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(grad), torch.empty_like(ctx.saved_tensors[2])


class MemoryWatch(TorchDispatchMode):
    """Counts the memory that operations make and let go of, and what collectives send.

    Args:
        known: Tensors whose memory does not count: parameters, gradients, buffers, a batch.
        tensor_size: Ranks of the tensor-parallel group.

    Attributes:
        live, peak: Bytes held now, and most so far.
        sent: Bytes that one rank sends in the collectives so far.
    """

    def __init__(self, known: Iterable[Tensor], tensor_size: int = 1) -> None:
        super().__init__()
        # The storages too: the address of one that is gone may come back as another's.
        self._known = {x.untyped_storage()._cdata: x.untyped_storage() for x in known}
        self._held: dict[int, weakref.ref[Any]] = {}
        self._tensor_size = tensor_size
        self.live = self.peak = 0
        self.sent = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        if func.namespace == "_c10d_functional":
            self._count_sent(func, args[0], result)
        return result

    def hold(self, x: Tensor) -> None:
        """Count the memory of ``x`` from now until it is let go of."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._held:
            return

        def let_go(_: object) -> None:
            self.live -= size
            del self._held[key]

        self._held[key] = weakref.ref(storage, let_go)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _count_sent(self, func: Any, x: Tensor, result: Tensor) -> None:
        whole = max(x.nbytes, result.nbytes)
        share = (self._tensor_size - 1) / self._tensor_size * whole
        # An all-reduce is a reduce-scatter and a gather.
        self.sent += 2 * share if "all_reduce" in func.name() else share


def measure_pass(stage: MMDiTStage, size: PassSize, *, grad: bool) -> PassCosts:
    """Run one pass through a stage, its backward included: once whole and once split.

    Args:
        stage: On the meta device (or a real one, to check this against).
        size: Of the pass.
        grad: Whether the pass has a backward.

    Raises:
        ValueError: The latents do not fit the model, or a pass with gradient runs on parameters
            without ``main_grad``, whose weight gradients cannot be left for later.
    """
    if grad and not all(hasattr(p, "main_grad") for p in stage.parameters()):
        raise ValueError(
            "parameters without main_grad cannot leave their gradients for later: make "
            "ShardedParameters of the stage before measuring a pass with gradient"
        )
    watch, forward = _watched(stage, size)
    with watch, _gradients(grad):
        out = forward()
        if not grad:
            return PassCosts(0, 0, watch.peak, watch.peak, watch.sent, 0.0)
        kept, forward_sent = watch.live, watch.sent
        _backward(out)
    held, split_working = _measure_split(stage, size)
    return PassCosts(
        kept, held, watch.peak - kept, split_working, forward_sent, watch.sent - forward_sent
    )


def _measure_split(stage: MMDiTStage, size: PassSize) -> tuple[int, int]:
    """``held`` and ``split_working``; lets go of things when the executor does."""
    watch, forward = _watched(stage, size)
    with watch, _gradients(True):
        out = forward()
        kept = watch.live
        working, watch.peak = watch.peak - kept, kept
        with stage.hold_weight_gradients() as work:
            _backward(out)
        del out, forward  # and the received payload, but for what the work's graph ties up
        held = watch.live
        working, watch.peak = max(working, watch.peak - max(kept, held)), held
        work.reverse()
        while work:
            work.pop()()
    return held, max(working, watch.peak - held)


def _backward(out: tuple[Tensor, ...]) -> None:
    torch.autograd.backward(out, [torch.empty_like(x) for x in out])


def _watched(
    stage: MMDiTStage, size: PassSize
) -> tuple[MemoryWatch, Callable[[], tuple[Tensor, ...]]]:
    """A watch that counts the received payload already, and what a pass calls on the stage."""
    forward, inputs = _forward(stage, size)
    parameters = list(stage.parameters())
    known = [*parameters, *stage.buffers()]
    known += [p.main_grad for p in parameters if hasattr(p, "main_grad")]
    if stage.is_first:
        return MemoryWatch([*known, *inputs], stage.mesh.tensor_size), forward
    watch = MemoryWatch(known, stage.mesh.tensor_size)
    watch.hold(*inputs)
    return watch, forward


def _gradients(on: bool) -> AbstractContextManager[object]:
    return torch.enable_grad() if on else torch.no_grad()


def _forward(
    stage: MMDiTStage, size: PassSize
) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
    """What a pass calls on the stage, and the tensors it is given."""
    B, device, dtype = size.rows, stage.mesh.device, stage.dtype
    if stage.is_first:
        config = stage.config
        latent = torch.empty(B, config.in_channels, size.height, size.width, device=device)
        text = torch.empty(
            B, size.text_length, config.joint_attention_dim, device=device, dtype=dtype
        )
        pooled = torch.empty(B, config.pooled_projection_dim, device=device, dtype=dtype)
        x = ModelInput(latent, torch.empty(B, device=device), TextCondition(text, pooled))
        inputs = [latent, x.timestep_B, text, pooled]

        def payload() -> Payload:
            return stage.embed(x)

    else:
        shapes = stage.payload_shapes(B, size.height, size.width, size.text_length)
        buffer = torch.empty(shapes.numel, device=device, dtype=dtype)
        leaves = Payload.unpack(buffer, shapes).leaves()
        inputs = [buffer]

        def payload() -> Payload:
            return leaves

    if stage.is_last:
        return lambda: (stage.velocity(payload(), size),), inputs
    return lambda: stage.run(payload(), size).tensors, inputs
