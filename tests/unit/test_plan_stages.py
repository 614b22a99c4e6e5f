"""What a pass costs on a stage: the same on the meta device as on a real one, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from soar_mega.backends import Backend
from soar_mega.backends.torch import TorchBackend
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.payload import PassSize, Payload
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.training.plan_stages import GpuBackend, PassCosts, measure_pass

SIZE = PassSize(rows=3, height=6, width=10, text_length=9)
IMAGE, TEXT, D = 15, 9, 64
# Of a GPU's flash attention beyond what the CPU's keeps: the state of a dropout it does not do.
RANDOM_STATE = 24


def architecture(qk_norm: str | None = None, dual: tuple[int, ...] = (0, 1)) -> MMDiTConfig:
    return MMDiTConfig(
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        caption_projection_dim=D,
        joint_attention_dim=40,
        pooled_projection_dim=24,
        pos_embed_max_size=12,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )


def stage_on(
    device: str,
    backend: Backend,
    layers: range = range(4),
    *,
    config: MMDiTConfig | None = None,
    recompute: str = "none",
    tensor_size: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
) -> MMDiTStage:
    mesh = Mesh(0, tensor_size, 0, tensor_size, 0, 1, None, None, None, torch.device(device))
    stage = MMDiTStage(
        config or architecture(),
        mesh,
        backend,
        layers=layers,
        sequence_parallel=sequence_parallel,
        activation_checkpointing=recompute,  # type: ignore[arg-type]
    )
    ShardedParameters([stage], mesh, dtype)
    return stage


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layers", [range(4), range(2), range(1, 3), range(2, 4)])
def test_meta_counts_what_the_cpu_holds(recompute: str, layers: range) -> None:
    """Attention included: the CPU's keeps what a GPU's flash attention keeps, in fp32."""
    on_cpu = stage_on("cpu", TorchBackend(), layers, recompute=recompute)
    on_meta = stage_on("meta", GpuBackend(), layers, recompute=recompute)
    attentions = 0 if recompute == "full" else sum(1 + (layer in (0, 1)) for layer in layers)
    real, counted = (measure_pass(stage, SIZE, grad=True) for stage in (on_cpu, on_meta))
    assert counted.kept == real.kept + attentions * RANDOM_STATE
    assert counted.working == pytest.approx(real.working, rel=0.01)
    # After an input backward nothing of the attention is left.
    assert counted.held == real.held
    assert counted.split_working == pytest.approx(real.split_working, rel=0.01)
    real, counted = (measure_pass(stage, SIZE, grad=False) for stage in (on_cpu, on_meta))
    assert counted.kept == real.kept == counted.held == real.held == 0
    assert counted.split_working == counted.working
    assert counted.working == pytest.approx(real.working, rel=0.01)


def test_kept_is_what_autograd_saves() -> None:
    """Another way to count: hooks on everything that is saved, each memory once."""
    stage = stage_on("cpu", TorchBackend(), range(1, 3))
    shapes = stage.payload_shapes(*SIZE)
    buffer = torch.zeros(shapes.numel)
    known = {x.untyped_storage()._cdata for x in stage.parameters()}
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        out = stage.run(Payload.unpack(buffer, shapes).leaves(), SIZE)
    for x in (buffer, *out.tensors):
        keep(x)
    total = sum(size for place, size in saved.items() if place not in known)
    assert measure_pass(stage, SIZE, grad=True).kept == total


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_held_is_what_the_weight_gradients_need(recompute: str) -> None:
    """Another way to count: every linear's input and output gradient, each memory once."""
    stage = stage_on("cpu", TorchBackend(), range(1, 3), recompute=recompute)
    shapes = stage.payload_shapes(*SIZE)
    out = stage.run(Payload.unpack(torch.zeros(shapes.numel), shapes).leaves(), SIZE)
    with stage.hold_weight_gradients() as work:
        out.backward(Payload.unpack(torch.zeros(shapes.numel), shapes))
    # Two modulations; a dual block's image in, out, MLP, second in and out; the text's; no dual.
    assert len(work) == 2 * 2 + 6 + 4 + 2 * 4
    pairs = [x for entry in work for x in entry.args[:2]]  # type: ignore[attr-defined]
    needed = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in pairs}
    held = measure_pass(stage, SIZE, grad=True).held
    # At most the received payload and its gradient besides.
    assert 0 <= held - sum(needed.values()) <= 2 * shapes.numel * 4


def test_without_main_grad_nothing_is_measured() -> None:
    mesh = Mesh.single("meta")
    stage = MMDiTStage(architecture(), mesh, GpuBackend())
    assert measure_pass(stage, SIZE, grad=False).working > 0
    with pytest.raises(ValueError, match="make ShardedParameters"):
        measure_pass(stage, SIZE, grad=True)


def test_recomputation_keeps_less_and_works_more() -> None:
    none, selective, full = (
        measure_pass(stage_on("meta", GpuBackend(), recompute=r), SIZE, grad=True)
        for r in ("none", "selective", "full")
    )
    assert none.kept > selective.kept > full.kept
    assert none.working < selective.working < full.working
    # Each of the 4 blocks keeps its inputs: both streams and its modulations, image 6 (dual 9)
    # and text 6 (last 2) vectors.
    rows, bytes_of = SIZE.rows, 4
    inputs = 4 * (IMAGE + TEXT) * rows * D + (2 * 9 + 2 * 6 + 3 * 6 + 2) * rows * D
    assert inputs * bytes_of < full.kept < 2 * inputs * bytes_of


def test_memory_grows_with_rows_and_shrinks_with_precision() -> None:
    config = architecture("rms_norm")
    fp32 = stage_on("meta", GpuBackend(), range(1, 3), config=config)
    bf16 = stage_on("meta", GpuBackend(), range(1, 3), config=config, dtype=torch.bfloat16)
    one = measure_pass(bf16, SIZE, grad=True).kept
    two = measure_pass(bf16, SIZE._replace(rows=6), grad=True).kept
    assert two == 2 * one - 3 * RANDOM_STATE
    # Norms' and attention's statistics stay fp32.
    assert 0.5 < one / measure_pass(fp32, SIZE, grad=True).kept < 0.55


def test_qk_norm_keeps_its_statistics_only() -> None:
    """The fused kernel keeps q and k as they lie in the linear's output, not a copy."""

    def kept(qk_norm: str | None) -> int:
        stage = stage_on("meta", GpuBackend(), range(2, 3), config=architecture(qk_norm))
        return measure_pass(stage, SIZE, grad=True).kept

    tokens = (IMAGE + TEXT) * SIZE.rows
    statistics, qkv = 2 * tokens * 4 * 4, 3 * tokens * D * 4
    assert kept("rms_norm") - kept(None) == statistics + qkv


def costs_of_a_middle_layer(sequence_parallel: bool) -> PassCosts:
    stage = stage_on(
        "meta",
        GpuBackend(),
        range(2, 3),
        config=architecture(dual=()),
        tensor_size=2,
        sequence_parallel=sequence_parallel,
    )
    return measure_pass(stage, SIZE, grad=True)


def test_bytes_that_tensor_ranks_send() -> None:
    """Two tensor ranks: an all-reduce sends the tensor once, a gather or scatter half of it."""
    tokens, modulation = (IMAGE + TEXT) * SIZE.rows * D * 4, 12 * SIZE.rows * D * 4
    whole = costs_of_a_middle_layer(sequence_parallel=False)
    # Attention and MLP sum both streams; all ranks gather the modulations.
    assert whole.forward_sent == 2 * tokens + modulation / 2
    # Backwards the inputs of QKV and MLP, and the conditioning vector.
    assert whole.backward_sent == 2 * tokens + SIZE.rows * D * 4
    padded = (16 + 10) * SIZE.rows * D * 4
    cut = costs_of_a_middle_layer(sequence_parallel=True)
    # A gather before and a scatter after each of attention and MLP.
    assert cut.forward_sent == 2 * 2 * padded / 2 + modulation / 2
    assert cut.backward_sent == 2 * 2 * padded / 2 + modulation / 2 + SIZE.rows * D * 4
    assert cut.kept < whole.kept


def test_one_rank_sends_nothing() -> None:
    costs = measure_pass(stage_on("meta", GpuBackend()), SIZE, grad=True)
    assert costs.forward_sent == costs.backward_sent == 0
