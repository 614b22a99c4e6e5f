"""A step's passes never make the host wait for the GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic", reason="pydantic is not installed")

from soar_mega.backends.torch import TorchBackend
from soar_mega.config import FlowMatchingConfig, SoarConfig
from soar_mega.model.init import initialise
from soar_mega.model.recompute import compiled_run_block, run_block
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
OBJECTIVES = {
    "sft": FlowMatchingConfig(name="flow_matching"),
    "soar": SoarConfig(name="soar", trajectory_length=3, num_rollout_paths=2, aux_group_size=2),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_not_wait(objective: str, schedule: str, compiled: bool) -> None:
    torch._dynamo.reset()
    mesh = Mesh.single("cuda")
    call_block = compiled_run_block() if compiled else run_block
    stage = MMDiTStage(CASE.architecture(), mesh, TorchBackend(), call_block=call_block)
    initialise(stage, 0)
    parameters = ShardedParameters([stage], mesh, torch.bfloat16)
    made = make_objective(OBJECTIVES[objective], shift=3.0, seed=0)
    plan = build_schedule(schedule, made.passes(), ranks=1, microbatches=2)
    pipeline = Pipeline([stage], mesh, plan)
    micros = [on(CASE.microbatch(), "cuda") for _ in range(2)]

    def step() -> None:
        parameters.zero_gradients()
        counts = torch.stack([made.count(micro) for micro in micros]).sum(dim=0)
        pipeline.train_step(made, micros, made.normaliser(counts))

    step()  # libraries start and graphs are compiled, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert parameters.flat_grad.abs().sum() > 0
