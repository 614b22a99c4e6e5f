"""What a pass costs on a stage, found by running the stage on the meta device: shapes, no numbers.

Nothing here is a formula for the model's activations: a torch dispatch mode watches which memory a
forward makes, what of it is still held when the forward is over, and how much more a backward needs
for a while. So recomputation, sequence parallelism and whatever a block does are counted as they
are.

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
        kept: Bytes held from the forward until the weight gradients are done: what autograd keeps,
            the received payload and the output.
        working: Most bytes in use beyond ``kept`` at any moment of forward and backward; of a pass
            without gradient all, the received payload too.
        forward_sent, backward_sent: Bytes a tensor-parallel rank sends (ring collectives).
    """

    kept: int
    working: int
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
        known: Tensors whose memory does not count: parameters, gradients, buffers, inputs.
        tensor_size: Ranks of the tensor-parallel group.

    Attributes:
        live, peak: Bytes held now, and most so far.
        sent: Bytes that one rank sends in the collectives so far.
    """

    def __init__(self, known: Iterable[Tensor], tensor_size: int = 1) -> None:
        super().__init__()
        self._known = {x.untyped_storage()._cdata for x in known}
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
                self._hold(leaf.untyped_storage())
        if func.namespace == "_c10d_functional":
            self._count_sent(func, args[0], result)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
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
    """Run one pass through a stage, its backward included.

    Args:
        stage: On the meta device (or a real one, to check this against).
        size: Of the pass.
        grad: Whether the pass has a backward.

    Raises:
        ValueError: The latents do not fit the model.
    """
    forward, inputs = _forward(stage, size)
    parameters = list(stage.parameters())
    gradients = [p.main_grad for p in parameters if hasattr(p, "main_grad")]
    watch = MemoryWatch(
        [*parameters, *gradients, *stage.buffers(), *inputs], stage.mesh.tensor_size
    )
    received = 0 if stage.is_first else inputs[0].untyped_storage().nbytes()
    with watch, _gradients(grad):
        out = forward()
        if not grad:
            return PassCosts(0, watch.peak + received, watch.sent, 0.0)
        kept, forward_sent = watch.live, watch.sent
        torch.autograd.backward(out, [torch.empty_like(x) for x in out])
    return PassCosts(kept + received, watch.peak - kept, forward_sent, watch.sent - forward_sent)


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
