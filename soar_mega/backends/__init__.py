"""Makers of linears, norms, attention and precision contexts behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from soar_mega.backends.elementwise import Elementwise
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh

# Weight gradients left undone by a backward, in its order; each entry does a part of them.
WeightWork = list[Callable[[], None]]


# A layer whose communication may run beside its products; by Transformer Engine's names.
Overlap = Literal["qkv", "proj", "fc1", "fc2"]


class Backend(Protocol):
    """What the model is built from.

    Linears take and return sequence-first tensors (``x_LBD``); with ``sequence_parallel`` the side
    that faces the residual stream holds one rank's share of the tokens. Weights are ``(out, in)``
    and may be a flattened view of their layout's shape (a fused QKV is laid out ``(3, D, D)``,
    stored ``(3D, D)``).

    Attributes:
        name: In messages.
        elementwise: What the model does between linears.
        token_multiple: What each rank's tokens are padded to a multiple of.
    """

    name: str
    elementwise: Elementwise
    token_multiple: int

    def for_layer(self, layer: int) -> Backend:
        """Maker of one block's parts, by the layer's number in the model."""

    def column_linear(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        *,
        sequence_parallel: bool,
        overlap: Overlap | None = None,
    ) -> nn.Module:
        """Output features cut over the tensor ranks; input whole, or gathered by tokens.

        Args:
            weight, bias, mesh, sequence_parallel: See ``Backend``.
            overlap: Whose communication buffers it may use; None: communication is not overlapped.
        """

    def row_linear(
        self,
        weight: ParameterLayout,
        bias: ParameterLayout,
        mesh: Mesh,
        *,
        sequence_parallel: bool,
        overlap: Overlap | None = None,
    ) -> nn.Module:
        """Input features cut over the tensor ranks; output summed, whole or scattered by tokens."""

    def linear(self, weight: ParameterLayout, bias: ParameterLayout, mesh: Mesh) -> nn.Module:
        """No communication: a replicated weight, or the local rows of a cut one."""

    def rms_norm(self, weight: ParameterLayout, mesh: Mesh, eps: float) -> nn.Module:
        """RMS norm over the last dimension with a learned weight."""

    def attention(self, q_LBHd: Tensor, k_SBHd: Tensor, v_SBHd: Tensor) -> Tensor:
        """Full softmax attention; returns ``(L, B, H * d)``."""

    def precision(self) -> AbstractContextManager[None]:
        """Context that the blocks' forwards of one pass run in; it asks whether there is a graph.

        Without a graph a pass leaves no trace.
        """

    def checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, whose backward computes it again; it draws no random numbers."""

    def training_step(self, watch: bool) -> AbstractContextManager[None]:
        """Context of one training step: weights do not change, gradients were set to zero before.

        Args:
            watch: Whether to gather ``statistics``.
        """

    def forget_step(self) -> None:
        """Put back what the last training step changed besides gradients."""

    def statistics(self) -> dict[str, Tensor]:
        """Metric -> 0-d of the last watched step; the largest over ranks is the run's."""

    def hold_weight_gradients(self) -> AbstractContextManager[WeightWork]:
        """Context in which a backward leaves the linears' weight gradients undone.

        What it yields is then the work that is left, to be run in order, once. Only parameters
        with a ``main_grad`` take part; the others, and the small ones of norms and of biases that
        join after a sum, get their gradients at once.
        """
