"""Transformer Engine on a GPU: what FP8 computes, and what passes leave behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("pydantic", reason="pydantic is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")

from soar_mega.backends import Backend
from soar_mega.backends.elementwise import Elementwise
from soar_mega.backends.te.backend import TEBackend
from soar_mega.backends.te.linear import TELinear
from soar_mega.backends.te.recipes import RecipeName, why_not
from soar_mega.backends.te.scaling import scaling_state
from soar_mega.backends.torch import TorchBackend
from soar_mega.config import FlowMatchingConfig, SoarConfig
from soar_mega.model.init import initialise
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule
from tests.gpu.test_cuda_equals_cpu import CASE, on

pytestmark = pytest.mark.gpu
RECIPES: tuple[RecipeName | None, ...] = (None, *get_args(RecipeName))
SOAR = SoarConfig(name="soar", trajectory_length=2)


def te_backend(recipe: RecipeName | None, **more: Any) -> TEBackend:
    reason = None if recipe is None else why_not(recipe)
    if reason is not None:
        pytest.skip(f"{recipe} does not run on this GPU: {reason}")
    return TEBackend(recipe, **more)


class Steps:
    """Steps of one model, all with the same weights and samples."""

    def __init__(
        self,
        backend: Backend,
        dtype: torch.dtype = torch.bfloat16,
        recompute: str = "none",
        settings: SoarConfig | FlowMatchingConfig = SOAR,
    ) -> None:
        self.mesh, self.backend = Mesh.single("cuda"), backend
        self.stage = MMDiTStage(
            CASE.architecture(),
            self.mesh,
            backend,
            activation_checkpointing=recompute,  # type: ignore[arg-type]
        )
        initialise(self.stage, 0)
        self.parameters = ShardedParameters([self.stage], self.mesh, dtype)
        self.objective = make_objective(settings, shift=3.0, seed=0)

    def run(self, schedule: str = "1f1b") -> dict[str, Tensor]:
        """The gradients."""
        self.parameters.zero_gradients()
        micro = on(CASE.microbatch(), "cuda")
        normaliser = self.objective.normaliser(self.objective.count(micro)).to("cuda")
        plan = build_schedule(schedule, self.objective.passes(), ranks=1, microbatches=1)
        with self.backend.training_step(watch=True):
            Pipeline([self.stage], self.mesh, plan).train_step(self.objective, [micro], normaliser)
        return {name: p.main_grad.clone() for name, p in self.stage.named_parameters()}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attention, which asks when it is made."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_point_where_those_of_fp32_do(recipe: RecipeName | None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = flat(Steps(TorchBackend(), torch.float32).run())
    steps = Steps(te_backend(recipe))
    for _ in range(2):  # delayed scaling has no history in the first
        found = flat(steps.run())
    cosine = F.cosine_similarity(found, exact, dim=0)
    assert cosine > (0.995 if recipe is None else 0.95)
    assert 0.8 < found.norm() / exact.norm() < 1.25


def test_a_linear_of_current_scaling_computes_what_rounding_says() -> None:
    backend, mesh = te_backend("current"), Mesh.single("cuda")
    linear = backend.column_linear(
        ParameterLayout((256, 128), 0, "sharded"),
        ParameterLayout((256,), 0, "sharded"),
        mesh,
        sequence_parallel=False,
    )
    assert isinstance(linear, TELinear)
    draw = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(64, 2, 128, generator=draw, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.normal_(generator=draw)
        for parameter in (linear.weight, linear.bias):
            parameter.data = parameter.data.bfloat16()
        with backend.precision():
            found = linear(x)

    def rounded(t: Tensor) -> Tensor:
        scale = 448.0 / t.abs().amax().float()
        return (t.float() * scale).to(torch.float8_e4m3fn).float() / scale

    torch.testing.assert_close(
        found.float(), rounded(x) @ rounded(linear.weight).t(), rtol=2e-2, atol=2e-1
    )
    exact = x.float() @ linear.weight.float().t()
    assert (found.float() - exact).norm() > 1e-3 * exact.norm()  # it is FP8, not bf16


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_steps_have_the_same_bits(recipe: RecipeName | None) -> None:
    assert_same(Steps(te_backend(recipe)).run(), Steps(te_backend(recipe)).run())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pass_without_gradient_leaves_no_trace(recipe: RecipeName | None) -> None:
    steps, control = Steps(te_backend(recipe)), Steps(te_backend(recipe))
    steps.run(), control.run()
    micro = on(CASE.microbatch(), "cuda")
    state = steps.objective.begin(micro)
    p = next(p for p in steps.objective.passes() if p.kind == "base")
    x = steps.objective.make_input(p, state)
    kept = scales(steps)

    def allocated() -> int:
        with torch.no_grad():
            steps.stage(x)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    assert allocated() >= allocated()
    for one, other in zip(scales(steps), kept, strict=True):
        assert torch.equal(one, other)
    assert_same(steps.run(), control.run())


def scales(steps: Steps) -> list[Tensor]:
    if getattr(steps.backend, "recipe", None) is None or "Delayed" not in str(
        type(steps.backend.recipe)  # type: ignore[attr-defined]
    ):
        return []
    states = scaling_state(dict(steps.stage.named_modules()))
    return [part.clone() for parts in states.values() for part in parts]


@pytest.mark.parametrize("recipe", RECIPES)
def test_lambda_0_is_sft(recipe: RecipeName | None) -> None:
    nothing = SoarConfig(name="soar", lambda_aux=0.0)
    assert_same(
        Steps(te_backend(recipe), settings=nothing).run(),
        Steps(te_backend(recipe), settings=FlowMatchingConfig(name="flow_matching")).run(),
    )


@pytest.mark.parametrize("recipe", ["current", "block", "mxfp8", None])
def test_cached_weights_do_not_outlive_their_step(recipe: RecipeName | None) -> None:
    def change(steps: Steps) -> None:
        steps.parameters.flat.mul_(1.25)

    steps, fresh = Steps(te_backend(recipe)), Steps(te_backend(recipe))
    steps.run()
    change(steps), change(fresh)
    assert_same(steps.run(), fresh.run())


@pytest.mark.parametrize("recipe", ["current", "block", "mxfp8", None])
def test_recomputed_blocks_have_the_same_gradients(recipe: RecipeName | None) -> None:
    near(Steps(te_backend(recipe), recompute="full").run, Steps(te_backend(recipe)).run)


def test_compiled_functions_go_with_recomputation() -> None:
    compiled = [
        Steps(te_backend("current", elementwise=Elementwise.compiled()), recompute=recompute)
        for recompute in ("full", "none")
    ]
    near(compiled[0].run, compiled[1].run)


@pytest.mark.parametrize("recipe", RECIPES)
def test_split_backwards_have_the_same_gradients(recipe: RecipeName | None) -> None:
    split = Steps(te_backend(recipe, split_backwards=True))
    near(lambda: split.run("zero_bubble"), Steps(te_backend(recipe)).run)


def near(got: Callable[[], dict[str, Tensor]], expected: Callable[[], dict[str, Tensor]]) -> None:
    one, other = got(), expected()
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert (one[name] - value).norm() <= 1e-3 * value.norm(), name


def test_delayed_scaling_goes_on_from_its_tensors() -> None:
    steps, other = Steps(te_backend("delayed")), Steps(te_backend("delayed"))
    steps.run(), steps.run()
    source, target = (scaling_state(dict(one.stage.named_modules())) for one in (steps, other))
    for name, parts in source.items():
        assert any(part.any() for part in parts)
        for part, into in zip(parts, target[name], strict=True):
            into.copy_(part)
    assert_same(other.run(), steps.run())


def test_statistics_of_a_step() -> None:
    steps = Steps(te_backend("current"))
    steps.run()
    found = {name: float(value) for name, value in steps.backend.statistics().items()}
    assert found["fp8/input_amax"] > 0 and found["fp8/gradient_amax"] > 0
    assert found["fp8/input_fill"] == pytest.approx(1.0)
    assert 0 <= found["fp8/gradient_underflow"] < 0.5
