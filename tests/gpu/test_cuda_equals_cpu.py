"""What must hold on a GPU: the same model, a step that runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic", reason="pydantic is not installed")

from soar_mega.backends.torch import TorchBackend
from soar_mega.config import SoarConfig
from soar_mega.model.init import initialise
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import MicroBatch, TextCondition
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.training.benchmark import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASE = Case(layers=4, head_dim=32, batch=3, latent_size=16, text_tokens=45)


def on(micro: MicroBatch, device: str) -> MicroBatch:
    def moved(condition: TextCondition) -> TextCondition:
        return TextCondition(condition.text_BTE.to(device), condition.pooled_BV.to(device))

    return MicroBatch(
        micro.step,
        micro.slots_B,
        micro.clean_BCHW.to(device),
        moved(micro.prompt),
        moved(micro.empty),
        micro.weight_B.to(device),
    )


def soar_gradient(device: str, dtype: torch.dtype) -> torch.Tensor:
    mesh = Mesh.single(device)
    stage = MMDiTStage(CASE.architecture(), mesh, TorchBackend())
    initialise(stage, 0)
    parameters = ShardedParameters([stage], mesh, dtype)
    objective = make_objective(SoarConfig(name="soar"), shift=3.0, seed=0)
    micro = on(CASE.microbatch(), device)
    normaliser = objective.normaliser(objective.count(micro)).to(device)
    schedule = build_schedule("1f1b", objective.passes(), ranks=1, microbatches=1)
    Pipeline([stage], mesh, schedule).train_step(objective, [micro], normaliser)
    return parameters.flat_grad.cpu()


def test_soar_gradient_equals_the_cpus() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = soar_gradient("cpu", torch.float32)
    result = soar_gradient("cuda", torch.float32)
    assert (result - expected).norm() <= 1e-4 * expected.norm()


def test_bf16_gradient_points_the_same_way() -> None:
    expected, result = (soar_gradient("cuda", t) for t in (torch.float32, torch.bfloat16))
    cosine = torch.nn.functional.cosine_similarity(result, expected, dim=0)
    assert cosine > 0.99
