"""The Transformer Engine backend on a stand-in: what passes leave behind, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soar_mega.backends.te import overlap
from soar_mega.backends.te.backend import TEBackend
from soar_mega.backends.te.linear import TELinear
from soar_mega.backends.te.recipes import RECIPES, make_recipe, multiple_of, why_not
from soar_mega.backends.te.scaling import scaling_state
from soar_mega.backends.te.statistics import E4M3, E5M2, Statistics, fit
from soar_mega.config import Config, ConfigError, load_config
from soar_mega.config.precision import PrecisionConfig
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.layout import check_layout
from soar_mega.training.precision import check_backend
from tests import te_stand_in
from tests.runs import REPOSITORY


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> te_stand_in.World:
    return te_stand_in.install(monkeypatch)


def make_linear(backend: TEBackend) -> TELinear:
    linear = backend.column_linear(
        ParameterLayout((32, 16), 0, "sharded"),
        ParameterLayout((32,), 0, "sharded"),
        Mesh.single(),
        sequence_parallel=False,
    )
    assert isinstance(linear, TELinear)
    with torch.no_grad():
        linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    for parameter in (linear.weight, linear.bias):
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    return linear


def some(factor: float = 1.0) -> Tensor:
    return factor * torch.randn(16, 2, 16, generator=torch.Generator().manual_seed(1))


def run(backend: TEBackend, linear: nn.Module, x: Tensor) -> None:
    with backend.precision():
        out = linear(x)
    if out.requires_grad:
        out.sum().backward()


def scales(linear: TELinear) -> list[Tensor]:
    (parts,) = scaling_state({"it": linear}).values()
    return [part.clone() for part in parts]


@pytest.mark.usefixtures("world")
def test_a_pass_without_gradient_leaves_no_trace_in_delayed_scaling() -> None:
    backend = TEBackend("delayed")
    linear = make_linear(backend)
    run(backend, linear, some())
    before = scales(linear)
    assert any(part.any() for part in before)
    with torch.no_grad():
        run(backend, linear, some(1000.0))
    for one, other in zip(scales(linear), before, strict=True):
        assert torch.equal(one, other)
    run(backend, linear, some())
    with torch.no_grad(), backend._te.autocast(recipe=backend.recipe):
        linear(some(1000.0))  # what it would leave
    assert linear.inner.fp8_meta["scaling_fwd"].amax_history[0, 0] > 1000


@pytest.mark.usefixtures("world")
def test_the_very_first_pass_may_be_without_gradient() -> None:
    backend = TEBackend("delayed")
    linear = make_linear(backend)
    with torch.no_grad():
        run(backend, linear, some(1000.0))
    run(backend, linear, some())
    assert linear.inner.fp8_meta["scaling_fwd"].amax_history.max() < 10


@pytest.mark.usefixtures("world")
def test_a_refused_step_leaves_delayed_scaling_as_it_was() -> None:
    backend = TEBackend("delayed")
    linear = make_linear(backend)
    with backend.training_step(watch=False):
        run(backend, linear, some())
    before = scales(linear)
    with backend.training_step(watch=False):
        run(backend, linear, some(1e6))
    assert any(not torch.equal(a, b) for a, b in zip(scales(linear), before, strict=True))
    backend.forget_step()
    assert all(torch.equal(a, b) for a, b in zip(scales(linear), before, strict=True))
    TEBackend("current").forget_step()


def test_weights_are_cached_within_a_step_only(world: te_stand_in.World) -> None:
    backend = TEBackend("current")
    linear = make_linear(backend)
    x = some()

    def flags() -> list[Any]:
        found = [facts["first"] for kind, facts in world.calls if kind == "linear"]
        world.calls.clear()
        return found

    with torch.no_grad():
        run(backend, linear, x)
    assert flags() == [None]
    for _ in range(2):
        with backend.training_step(watch=False):
            with torch.no_grad():
                run(backend, linear, x)
            for _ in range(2):
                run(backend, linear, x)
            with torch.no_grad():
                run(backend, linear, x)
        assert flags() == [None, True, False, False]
    with torch.no_grad():
        linear.weight.mul_(2)
        with backend.precision():
            assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("recipe", ["current", None])
@pytest.mark.parametrize("mode", ["column", "row"])
def test_held_weight_gradients_are_those_done_at_once(recipe: Any, mode: str) -> None:
    x, found = some(), []
    for split in (False, True):
        backend = TEBackend(recipe, split_backwards=split)
        linear = make_linear(backend)
        with backend.training_step(watch=False):
            outs = []
            for factor in (1.0, 3.0):
                with backend.precision():
                    outs.append(linear(factor * x))
            works = []
            for out in outs:
                with backend.hold_weight_gradients() as work:
                    out.square().sum().backward()
                works.append(work)
            for work in works:
                assert len(work) == int(split)
                for do in work:
                    do()
        assert linear.bias.grad is None or not split
        if linear.bias.grad is not None:  # a hook of ShardedParameters would move it
            linear.bias.main_grad.add_(linear.bias.grad)  # type: ignore[attr-defined]
        found.append((linear.weight.main_grad, linear.bias.main_grad))  # type: ignore[attr-defined]
    assert found[0][0].any()
    torch.testing.assert_close(found[0][0], found[1][0])
    if recipe is None:  # in FP8 autograd has it, and a test cleared it above
        torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.usefixtures("world")
def test_whole_backwards_of_a_split_backend_are_refused() -> None:
    backend = TEBackend("current", split_backwards=True)
    linear = make_linear(backend)
    with pytest.raises(RuntimeError, match="split backwards"):
        run(backend, linear, some())


@pytest.mark.usefixtures("world")
def test_blocks_named_stay_with_torch() -> None:
    backend = TEBackend("current", bf16_layers=(2,))
    assert backend.for_layer(1) is backend
    assert backend.for_layer(2).name == "torch"


def test_statistics_see_what_vanishes_and_what_overflows() -> None:
    x = torch.tensor([0.0, 448.0, 1.0, 2.0**-11, -(2.0**-12)])
    amax, underflow, fill = fit(x, *E4M3)
    assert (amax, underflow, fill) == (448.0, pytest.approx(2 / 5), 1.0)
    amax, underflow, fill = fit(x, *E4M3, scale=torch.tensor(4.0))
    assert (amax, underflow, fill) == (448.0, 0.0, 4.0)
    assert fit(torch.tensor([57344.0, 2.0**-18]), *E5M2)[1] == pytest.approx(1 / 2)
    assert fit(torch.zeros(3), *E4M3).tolist() == [0.0, 0.0, 0.0]
    assert not math.isfinite(fit(torch.tensor([math.inf, 1.0]), *E4M3)[0])
    assert set(Statistics(E5M2).largest()) == {
        f"fp8/{kind}_{name}"
        for kind in ("input", "gradient")
        for name in ("amax", "underflow", "fill")
    }


def test_a_watched_step_notes_inputs_and_gradients(world: te_stand_in.World) -> None:
    backend = TEBackend("delayed")
    linear = make_linear(backend)
    with backend.training_step(watch=True):
        run(backend, linear, some(10.0))
        run(backend, linear, some(1e6))  # only the first pass is looked at
    found = backend.statistics()
    assert found["fp8/input_amax"] == some(10.0).abs().max()
    assert found["fp8/gradient_amax"] == 1
    with backend.training_step(watch=True):
        run(backend, linear, some(1e7))
    # Delayed scaling made room for what was seen before.
    assert backend.statistics()["fp8/input_fill"] > 5
    with backend.training_step(watch=False):
        run(backend, linear, some())
    assert backend.statistics() == {}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_take_what_they_are_given(recipe: Any) -> None:
    made = make_recipe(recipe, reduce_amax=False)
    assert recipe != "delayed" or made.reduce_amax is False
    assert why_not(recipe) is None
    assert multiple_of(recipe) in (16, 32)


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PrecisionConfig(backend="te")
    with pytest.raises(ConfigError, match=r"precision.backend = te needs Transformer Engine"):
        check_backend(config, torch.device("cuda"))
    te_stand_in.install(monkeypatch)
    with pytest.raises(ConfigError, match=r"runs on CUDA, but this run is on cpu"):
        check_backend(config, torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Old GPU")
    check_backend(config, torch.device("cuda"))
    refuse = lambda **_: (False, "Device compute capability 8.9 or higher required.")  # noqa: E731
    monkeypatch.setattr("transformer_engine.pytorch.is_fp8_available", refuse)
    with pytest.raises(ConfigError, match=r"fp8_recipe = current does not run .*Old GPU.* 8\.9"):
        check_backend(config, torch.device("cuda"))
    check_backend(PrecisionConfig(backend="te", fp8_recipe="none"), torch.device("cuda"))
    check_backend(PrecisionConfig(), torch.device("cpu"))


def config_of(*overrides: str) -> Config:
    return load_config(
        REPOSITORY / "configs" / "tiny_soar.yaml",
        ["train.global_batch_size=48", "train.micro_batch_size=1", *overrides],
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("precision.fp8_recipe=current",), "fp8_recipe = current needs precision.backend = te"),
        (("precision.backend=te", "precision.compute_dtype=fp32"), "computes in bf16 and FP8"),
        (("precision.bf16_layers=[0]",), "bf16_layers = \\[0\\] excepts blocks from FP8"),
        (
            ("precision.backend=te", "train.activation_checkpointing=selective"),
            "selective picks among torch's operations",
        ),
        (
            (
                "precision.backend=te",
                "precision.fp8_recipe=delayed",
                "train.activation_checkpointing=full",
            ),
            "histories of precision.fp8_recipe = delayed",
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of("precision.compute_dtype=bf16", *overrides)


MEDIUM = MMDiTConfig(
    sample_size=128,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)
LARGE = replace(
    MEDIUM,
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=2432,
    dual_attention_layers=(),
)


@pytest.mark.parametrize("recipe", [*RECIPES, "none"])
@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6, 8, 16, 19, 38])
@pytest.mark.parametrize("model", [MEDIUM, LARGE], ids=["medium", "large"])
def test_features_fp8_cannot_multiply_are_refused(
    recipe: str, tensor: int, model: MMDiTConfig
) -> None:
    """Failure case 27: what passes here divides, what is refused names rule and sizes that work."""
    if not model.can_cut(tensor):
        return
    config = config_of(
        "precision.compute_dtype=bf16",
        "precision.backend=te",
        f"precision.fp8_recipe={recipe}",
        f"parallel.tensor_model_parallel_size={tensor}",
        f"train.global_batch_size={tensor}",
    )
    multiple = multiple_of(config.precision.recipe)
    heads = -(-model.num_attention_heads // tensor)
    fits = not any(n % multiple for n in (64 * heads, model.width, 4 * model.width // tensor))
    if fits:
        assert check_layout(config, model, tensor) == 1
        return
    with pytest.raises(ConfigError, match=rf"fp8_recipe = {recipe}.*multiples of {multiple}") as e:
        check_layout(config, model, tensor)
    assert "[1, " in str(e.value)


OVERLAP = (
    "precision.compute_dtype=bf16",
    "precision.backend=te",
    "parallel.tensor_parallel_overlap=true",
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "objective.aux_group_size=1",
    "validation.validation_steps=null",
    "validation.image_steps=null",
)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision.backend=torch", "precision.backend = torch"),
        ("precision.fp8_recipe=block", "precision.fp8_recipe = block"),
        ("precision.fp8_recipe=mxfp8", "precision.fp8_recipe = mxfp8"),
        ("parallel.tensor_model_parallel_size=1", "tensor_model_parallel_size = 1"),
        ("parallel.sequence_parallel=false", "sequence_parallel = false"),
        ("parallel.pipeline_schedule=zero_bubble", "pipeline_schedule = zero_bubble"),
        ("objective.aux_group_size=2", "aux_group_size = 2"),
        ("validation.validation_steps=5", "validation_steps = 5"),
    ],
)
def test_what_overlapping_buffers_cannot_serve(override: str, message: str) -> None:
    config_of(*OVERLAP)
    with pytest.raises(ConfigError, match=f"tensor_parallel_overlap keeps .*{message} does not go"):
        config_of(*OVERLAP, override, "validation.shards=x.tar")


def test_only_image_linears_overlap(
    world: te_stand_in.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = replace(Mesh.single(), tensor_size=2, tensor_group="a group")  # type: ignore[arg-type]
    overlap.start(mesh, 2048, 1536, fp8=True)
    (buffers,) = [facts for kind, facts in world.calls if kind == "buffers"]
    assert (buffers["shape"], buffers["tp_size"]) == ([2048, 1536], 2)
    assert buffers["quantization_modes"] == ["fp8"]
    small = replace(MEDIUM, num_layers=2, dual_attention_layers=(0,))
    MMDiTStage(small, mesh, TEBackend("current", overlaps=True), sequence_parallel=True)
    told = [facts for kind, facts in world.calls if kind == "new linear"]
    gathering = {"ub_overlap_ag": True, "ub_bulk_dgrad": True, "ub_bulk_wgrad": True}
    scattering = {"ub_overlap_rs": True, "ub_overlap_ag": True}
    found = [facts["ub_name"] for facts in told if facts]
    assert sorted(found) == sorted(["qkv", "proj"] * 3 + ["fc1", "fc2"] * 2)
    for facts in (facts for facts in told if facts):
        wanted = gathering if facts["ub_name"] in ("qkv", "fc1") else scattering
        assert facts == {**wanted, "ub_name": facts["ub_name"]}
    assert sum(not facts for facts in told) == 2 * 4 - 3  # the last block has no text output
    world.calls.clear()

    def refuse(**_: object) -> None:
        raise RuntimeError("no multicast.")

    monkeypatch.setattr("transformer_engine.pytorch.module.base.initialize_ub", refuse)
    with pytest.raises(ValueError, match=r"cannot make its buffers here: no multicast\. Tensor"):
        overlap.start(mesh, 2048, 1536, fp8=True)
    MMDiTStage(small, mesh, TEBackend("current"), sequence_parallel=True)
    assert not any(facts for kind, facts in world.calls if kind == "new linear")


def test_a_block_there_is_not_cannot_stay_in_bf16() -> None:
    config = config_of(
        "precision.compute_dtype=bf16", "precision.backend=te", "precision.bf16_layers=[0,24]"
    )
    with pytest.raises(ConfigError, match=r"bf16_layers names \[24\], .* 0 to 23"):
        check_layout(config, MEDIUM, 1)
