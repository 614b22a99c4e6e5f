"""Compiled blocks on a GPU: the eager gradient, and no graph after the first step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("pydantic", reason="pydantic is not installed")

from soar_mega.backends.elementwise import Elementwise
from soar_mega.backends.torch import TorchBackend
from soar_mega.config import SoarConfig
from soar_mega.model.init import initialise
from soar_mega.model.recompute import BlockCall, compiled_run_block, run_block
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule
from tests.gpu.test_cuda_equals_cpu import CASE, on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Steps:
    """SOAR steps of one model on a GPU, all with the same weights and samples."""

    def __init__(
        self, call_block: BlockCall, dtype: torch.dtype, recompute: str, group: int
    ) -> None:
        self.mesh = Mesh.single("cuda")
        self.stage = MMDiTStage(
            CASE.architecture(),
            self.mesh,
            TorchBackend(),
            activation_checkpointing=recompute,  # type: ignore[arg-type]
            call_block=call_block,
        )
        initialise(self.stage, 0)
        draw = torch.Generator("cuda").manual_seed(0)
        with torch.no_grad():
            for parameter in self.stage.parameters():  # gates begin at zero
                shape = parameter.shape
                parameter += 0.05 * torch.randn(shape, generator=draw, device="cuda")
        self.parameters = ShardedParameters([self.stage], self.mesh, dtype)
        settings = SoarConfig(name="soar", aux_group_size=group)
        self.objective = make_objective(settings, shift=3.0, seed=0)

    def run(self, schedule: str = "1f1b") -> Tensor:
        """The flat gradient."""
        self.parameters.zero_gradients()
        micro = on(CASE.microbatch(), "cuda")
        normaliser = self.objective.normaliser(self.objective.count(micro))
        plan = build_schedule(schedule, self.objective.passes(), ranks=1, microbatches=1)
        Pipeline([self.stage], self.mesh, plan).train_step(self.objective, [micro], normaliser)
        return self.parameters.flat_grad.clone()


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_gradient_equals_the_eager_one(recompute: str, group: int) -> None:
    torch._dynamo.reset()
    exact = Steps(run_block, torch.float32, recompute, group).run()
    eager = Steps(run_block, torch.bfloat16, recompute, group).run()
    compiled = Steps(compiled_run_block(), torch.bfloat16, recompute, group)
    tolerance = 1.5 * (eager - exact).norm()
    assert 0 < tolerance < 0.5 * exact.norm()
    assert (compiled.run() - exact).norm() <= tolerance
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert (compiled.run() - exact).norm() <= tolerance
        # Its weight gradients wait while Inductor uses memory again.
        assert (compiled.run("zero_bubble") - exact).norm() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_elementwise_functions_equal_the_plain_ones(dtype: torch.dtype) -> None:
    draw = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cuda", dtype=dtype)

    x, y = random(300, 4, 256), random(300, 4, 256)
    scale, shift, gate = random(4, 256), random(4, 256), random(4, 256)
    torch._dynamo.reset()
    results = []
    for functions in (Elementwise(), Elementwise.compiled()):
        leaves = [t.clone().requires_grad_() for t in (x, y, scale, shift, gate)]
        a, b, c, d, e = leaves
        first, second = functions.twice_modulated_norm(a, (c, d), (d, e), 1e-6)
        inner = functions.modulated_norm(functions.gelu(first + second), c, d, 1e-6)
        out = functions.gated_add(inner, e, b)
        out.backward(x)
        results.append([out.detach(), *(t.grad for t in leaves)])
    for plain, compiled in zip(*results, strict=True):
        assert (compiled - plain).norm() <= (
            1e-5 if dtype == torch.float32 else 3e-2
        ) * plain.norm()
