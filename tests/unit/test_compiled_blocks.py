"""Blocks under torch.compile: the losses and gradients of eager ones, and graphs that are shared.

Most cases use ``aot_eager``, which does everything but generate code: Inductor's C++ compiler takes
minutes for a matrix. The matrices are for ``make test-full``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from soar_mega.backends.torch import TorchBackend
from soar_mega.config import Config, SoarConfig
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.init import initialise
from soar_mega.model.payload import PassSize, Payload
from soar_mega.model.recompute import BlockCall, Recompute, compiled_run_block, run_block
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import MicroBatch, TextCondition
from soar_mega.pipeline.actions import Kind
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.training.precision import block_call

MODEL = MMDiTConfig(
    sample_size=8,
    num_layers=4,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    pos_embed_max_size=8,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
KINDS = {"dual": 0, "plain": 1, "last": 3}  # and a layer of each; 2 is plain too
ROWS, SIDE, TEXT = 2, 8, 5
no_more_graphs = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_stage(
    call_block: BlockCall,
    layers: range | None = None,
    recompute: str = "none",
    model: MMDiTConfig = MODEL,
) -> tuple[MMDiTStage, ShardedParameters]:
    stage = MMDiTStage(
        model,
        Mesh.single(),
        TorchBackend(),
        layers=layers,
        activation_checkpointing=Recompute(recompute).value,
        call_block=call_block,
    )
    initialise(stage, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stage.parameters():  # gates begin at zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return stage, ShardedParameters([stage], Mesh.single())


def microbatch() -> MicroBatch:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def condition(rows: int) -> TextCondition:
        return TextCondition(draw(rows, TEXT, 24), draw(rows, 20))

    latent = draw(ROWS, 16, SIDE, SIDE)
    return MicroBatch(
        3, torch.arange(ROWS), latent, condition(ROWS), condition(1), torch.ones(ROWS)
    )


class Steps:
    """SOAR steps of the whole model, all with the same weights and samples."""

    def __init__(
        self, call_block: BlockCall, group: int, recompute: str, model: MMDiTConfig
    ) -> None:
        self.stage, self.parameters = make_stage(call_block, None, recompute, model)
        settings = SoarConfig(name="soar", trajectory_length=3, aux_group_size=group)
        self.objective = make_objective(settings, shift=3.0, seed=0)

    def run(self, schedule: str = "1f1b") -> tuple[Tensor, Tensor]:
        """The flat gradient, and all loss terms."""
        plan = build_schedule(schedule, self.objective.passes(), ranks=1, microbatches=1)
        kinds = {action.kind for action in plan.actions[0]}
        assert (Kind.INPUT_BACKWARD in kinds) == (schedule == "zero_bubble")
        self.parameters.zero_gradients()
        micro = microbatch()
        normaliser = self.objective.normaliser(self.objective.count(micro))
        (terms,) = Pipeline([self.stage], Mesh.single(), plan).train_step(
            self.objective, [micro], normaliser
        )
        losses = torch.cat([terms.base_B[None], terms.aux_KB])
        return self.parameters.flat_grad.clone(), losses


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert b.abs().sum() > 0
        assert (a - b).norm() <= 1e-5 * b.norm()


def check_soar_steps(
    backend: str, recompute: str, group: int, graphs: int, model: MMDiTConfig = MODEL
) -> None:
    counter = CompileCounterWithBackend(backend)
    expected = Steps(run_block, group, recompute, model).run()
    steps = Steps(compiled_run_block(backend=counter), group, recompute, model)
    assert_same(steps.run(), expected)
    # Not one graph more than kinds of blocks times different passes.
    kinds = {(model.is_dual(n), model.is_last(n)) for n in range(model.num_layers)}
    assert counter.frame_count == graphs * len(kinds)
    with no_more_graphs:
        assert_same(steps.run(), expected)
        # The split backward is the same graphs: weight gradients are held inside an operator.
        assert_same(steps.run("zero_bubble"), expected)


def test_a_soar_step_has_the_losses_and_gradients_of_eager_blocks() -> None:
    # A group of one state has the size of the base pass: its graph, and the rollout's.
    check_soar_steps("aot_eager", "none", group=1, graphs=2)


def test_groups_of_states_have_graphs_of_their_own_and_no_more() -> None:
    # base and the last, shorter group; rollout; groups of two.
    model = replace(MODEL, num_layers=1, dual_attention_layers=())
    check_soar_steps("eager", "none", group=2, graphs=3, model=model)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_soar_steps(backend: str, recompute: str) -> None:
    check_soar_steps(backend, recompute, group=2, graphs=3)


class Block:
    """One layer as a stage of its own, its input and the gradient of its output given."""

    def __init__(self, layer: int, call_block: BlockCall, recompute: str) -> None:
        self.stage, self.parameters = make_stage(call_block, range(layer, layer + 1), recompute)
        self.own = {p.untyped_storage().data_ptr() for p in self.stage.parameters()}

    def run(self, *, hold: bool = False) -> tuple[list[Tensor], int]:
        """Output, flat gradient and input gradients; and the bytes kept for the backward."""
        size = PassSize(ROWS, SIDE, SIDE, TEXT)
        shapes = self.stage.payload_shapes(*size)
        buffer = torch.randn(shapes.numel, generator=torch.Generator().manual_seed(2))
        entered = Payload.unpack(buffer, shapes).leaves()
        self.own |= {buffer.untyped_storage().data_ptr()}
        kept: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: self._note(kept, x), lambda x: x):
            if self.stage.is_last:
                left: tuple[Tensor, ...] = (self.stage.velocity(entered, size),)
            else:
                left = self.stage.run(entered, size).tensors
        gradients = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in left]
        self.parameters.zero_gradients()
        if hold:
            with self.stage.hold_weight_gradients() as work:
                torch.autograd.backward(left, gradients)
            before = self.parameters.flat_grad.clone()
            for each in work[::-1]:
                each()
            assert not torch.equal(before, self.parameters.flat_grad)
        else:
            torch.autograd.backward(left, gradients)
        inputs = entered.gradient().tensors
        return [*(x.detach() for x in left), self.parameters.flat_grad.clone(), *inputs], sum(
            kept.values()
        )

    def _note(self, kept: dict[int, int], x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x


def check_block(backend: str, recompute: str, kind: str) -> int:
    """Compiled as eager, held or not; the bytes that the compiled block keeps."""
    expected, _ = Block(KINDS[kind], run_block, recompute).run()
    block = Block(KINDS[kind], compiled_run_block(backend=backend), recompute)
    got, kept = block.run()
    assert_same(got, expected)
    with no_more_graphs:
        assert_same(block.run(hold=True)[0], expected)
    return kept


def test_recomputing_blocks_have_eager_gradients_and_keep_less() -> None:
    kept = {}
    for recompute in (Recompute.SELECTIVE, Recompute.FULL):
        torch._dynamo.reset()
        kept[recompute] = check_block("aot_eager", recompute, "plain")
    # Little more than the modulation, which is made outside of the block.
    assert kept[Recompute.FULL] < 0.2 * kept[Recompute.SELECTIVE]


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_kind_of_block(backend: str, recompute: str, kind: str) -> None:
    check_block(backend, recompute, kind)


def test_stages_of_a_rank_share_their_graphs() -> None:
    counter = CompileCounterWithBackend("eager")
    call_block, backend = compiled_run_block(backend=counter), TorchBackend()
    size = PassSize(ROWS, SIDE, SIDE, TEXT)
    for layer in (1, 2):
        layers = range(layer, layer + 1)
        stage = MMDiTStage(MODEL, Mesh.single(), backend, layers=layers, call_block=call_block)
        initialise(stage, 0)
        ShardedParameters([stage], Mesh.single())
        shapes = stage.payload_shapes(*size)
        stage.run(Payload.unpack(torch.zeros(shapes.numel), shapes).leaves(), size)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["torch", "te"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_the_configuration_chooses(backend: str, compiled: bool, tensor_size: int) -> None:
    config = Config.model_validate(
        {
            "run": {"dir": "runs/x"},
            "model": {"pretrained": "x"},
            "parallel": {"tensor_model_parallel_size": tensor_size},
            "precision": {"compile": compiled, "backend": backend},
            "objective": {"name": "soar"},
            "data": {"shards": "x"},
            "train": {"max_train_steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        }
    )
    assert (block_call(config) is not run_block) == (compiled and backend == "torch")


def test_many_picture_sizes_share_their_graphs() -> None:
    counter = CompileCounterWithBackend("eager")
    stage, _ = make_stage(compiled_run_block(dynamic=None, backend=counter), range(1, 2))

    def run(sides: list[int]) -> None:
        for side in sides:
            size = PassSize(ROWS, side, SIDE, TEXT)
            shapes = stage.payload_shapes(*size)
            payload = Payload.unpack(torch.randn(shapes.numel), shapes).leaves()
            left = stage.run(payload, size)
            left.backward(Payload(*(torch.ones_like(x) for x in left.tensors)))

    run([8, 6])
    assert counter.frame_count == 2
    with no_more_graphs:
        run([8, 6, 4, 10, 12])
