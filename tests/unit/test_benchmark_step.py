"""The benchmark of a training step: both sides compute the same, and what is made of it."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.checkpoint.importer import load_diffusers_transformer
from soar_mega.config import ConfigError
from soar_mega.objectives.soar import SoarState
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.benchmark import Case
from soar_mega.training.benchmark_step import measure
from soar_mega.training.benchmark_step.compare import Plan, compare
from soar_mega.training.benchmark_step.load import Load, published, with_optimizer_if_it_fits
from soar_mega.training.benchmark_step.measure import Failure, Measured, here, outcome_from_json
from soar_mega.training.benchmark_step.ours import OurSide
from soar_mega.training.benchmark_step.picture import draw as draw_picture
from soar_mega.training.benchmark_step.record import read_record
from soar_mega.training.benchmark_step.reference import Draws, ReferenceSide, draw
from soar_mega.training.benchmark_step.report import bounds, lines
from soar_mega.training.benchmark_step.variants import DEFAULTS, Variant, parse_variant

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(layers=3, heads=2, head_dim=16, dual_layers=1, latent_size=8, text_tokens=7)
OURS = Variant(micro_batch_size=1)
REFERENCE = Variant("reference", micro_batch_size=1)
CHECKPOINTED = replace(REFERENCE, activation_checkpointing="full")


def small(objective: Any = "soar", **more: Any) -> Load:
    settings = {"device": "cpu", "dtype": "fp32", "latent_size": 8, "text_tokens": 7, "threads": 1}
    return Load("small", CASE.architecture(), objective, **settings | more)


def our_draws(side: OurSide, step: int, load: Load) -> Draws:
    """What our objective draws in a step, for the reference."""
    micro = replace(load.microbatch(OURS), step=step)
    state = side.objective.begin(micro)
    if not isinstance(state, SoarState):
        none_NB = torch.zeros(0, len(state.sigma_B))
        return Draws(state.noise_BCHW, state.sigma_B, state.sigma_B, none_NB)
    objective: Any = side.objective
    t1_B = (objective.draw_t0(step, micro.slots_B) - 1 / 40).clamp(min=0)
    sigma1_B = objective.grid.sigma(t1_B)
    return Draws(state.noise_BCHW, state.sigma_B, sigma1_B.float(), state.sigma_KB)


@pytest.mark.parametrize("objective", ["soar", "sft"])
@pytest.mark.parametrize("reference", [REFERENCE, CHECKPOINTED])
def test_both_sides_compute_the_same_step(
    objective: str, reference: Variant, tmp_path: Path
) -> None:
    """Fed with the same weights and draws: loss and gradient norm. So they do the same work."""
    load = small(objective)
    ours, theirs = OurSide(load, OURS), ReferenceSide(load, reference)
    theirs.model.save_pretrained(tmp_path / "transformer")
    load_diffusers_transformer(tmp_path, ours.stages, Mesh.single())
    step, micro = 5, load.microbatch(OURS)
    expected = theirs.backward(micro, our_draws(ours, step, load))
    ours.parameters.zero_gradients()
    found = ours.backward(replace(micro, step=step))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    gradients = [p.grad for p in theirs.model.parameters()]
    norm = torch.stack([g.double().norm() for g in gradients if g is not None]).norm()
    found_norm = ours.parameters.gradient_norm(ours.parameters.flat_grad)
    assert float(found_norm) == pytest.approx(float(norm), rel=1e-4)
    assert norm > 0


def test_gradient_checkpointing_of_the_reference_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward with graph runs its blocks a second time in the backward."""
    counts = []
    for variant in (REFERENCE, CHECKPOINTED):
        side, calls = ReferenceSide(small("sft"), variant), []
        for block in side.model.transformer_blocks:
            block.attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        side.step()
        counts.append(len(calls))
    assert counts == [CASE.layers, 2 * CASE.layers]


def test_the_references_own_draws_follow_the_method() -> None:
    torch.manual_seed(0)
    micro = small().microbatch(replace(OURS, micro_batch_size=512))
    draws = draw(micro, 6)
    t = torch.arange(1, 1001) / 1000
    table = 3 * t / (1 + 2 * t)
    for sigma_B in (draws.sigma0_B, draws.sigma1_B):
        assert torch.isclose(sigma_B[:, None], table, rtol=1e-6, atol=0).any(dim=1).all()
    assert (draws.sigma1_B <= draws.sigma0_B).all() and (draws.sigma1_B < draws.sigma0_B).any()
    assert draws.sigma_NB.shape == (6, 512) and draws.sigma_NB.max() <= 1
    assert (draws.sigma_NB >= draws.sigma1_B.clamp(min=0.00299)).all()
    assert abs(draws.noise_BCHW.mean()) < 0.02 and abs(draws.noise_BCHW.std() - 1) < 0.02


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", [OURS, REFERENCE])
def test_a_step_trains_the_weights(variant: Variant, dtype: Any) -> None:
    """AdamW reaches the weights the forward uses, bf16 ones by way of fp32 masters."""
    load = small("sft", dtype=dtype)
    side = (OurSide if variant is OURS else ReferenceSide)(load, variant)
    modules = side.stages if isinstance(side, OurSide) else [side.model]
    weights = [p for module in modules for p in module.parameters()]
    before = [p.detach().clone() for p in weights]
    assert {p.dtype for p in weights} == {load.torch_dtype}
    for _ in range(3):
        assert math.isfinite(float(side.step()))
    moved = sum(int((p != old).sum()) for p, old in zip(weights, before, strict=True))
    assert moved > 0.01 * sum(p.numel() for p in weights)


# --- what is counted -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "variant", "factor"),
    [("sft", OURS, 3), ("sft", REFERENCE, 3), ("soar", OURS, 22), ("soar", REFERENCE, 23)],
)
def test_recomputation_and_grouping_change_no_factor(
    objective: Any, variant: Variant, factor: int
) -> None:
    load = small(objective)
    assert load.factor(variant) == factor
    assert load.factor(replace(variant, activation_checkpointing="full")) == factor
    assert load.factor(replace(variant, aux_group_size=3)) == factor


def test_published_models() -> None:
    medium, large = (
        published(ROOT / "configs/architectures" / name, "soar")
        for name in ("sd35_medium", "sd35_large")
    )
    assert round(medium.forward_flops() / 1e12, 3) == 2.138
    assert round(large.forward_flops() / 1e12, 3) == 6.860
    assert (medium.parameters(), large.parameters()) == (2_243_171_520, 8_056_627_520)
    assert (medium.default_micro_batch(), large.default_micro_batch()) == (4, 1)
    h200 = 150 * 10**9
    assert with_optimizer_if_it_fits(medium, h200).optimizer
    assert not with_optimizer_if_it_fits(large, h200).optimizer


def faked(seconds: float) -> Measured:
    return Measured((seconds,), held_bytes=100, peak_growth_bytes=50, loss=1.0, ready_seconds=0.0)


def test_medians_and_ratios() -> None:
    times = {"reference": iter([8.0, 4.0, 5.0]), "ours": iter([2.0, 9.0, 1.0])}
    plan = Plan((small(),), (Variant(activation_checkpointing="full"),), (2,))
    (table,) = compare(plan, lambda _, v, *__: faked(next(times[v.side], 10.0)), peak_tflops=1e-3)
    published_side, plain, ours = table["sides"]
    assert [side["label"] for side in table["sides"]][1] == "reference, no checkpointing"
    assert ours["median"]["samples_per_s"] == 2 / 2.0
    work = 22 * table["forward_tflop"]
    assert ours["median"]["model_tflops"] == pytest.approx(work)
    assert ours["median"]["mfu"] == pytest.approx(work / 1e-3)
    assert ours["median"]["total_peak_bytes"] == 150
    # What recomputes as much as this one is the reference as published.
    speed = published_side["median"]["seconds"] / 2.0
    expected = {"speed": speed, "memory": 1.0}
    assert ours["ratios"] == {"as published": expected, "same recomputation": expected}
    assert published_side["ratios"] == plain["ratios"] == {}


def test_sides_take_turns_in_both_directions() -> None:
    order: list[str] = []

    def run(load: Load, variant: Variant, *_: int) -> Measured:
        order.append(f"{load.objective} {variant.micro_batch_size} {variant.label}")
        return faked(1.0)

    variants = (Variant(), Variant(aux_group_size=2, micro_batch_size=3))
    plan = Plan((small("sft"), small("soar")), variants, (2,), with_reference=False, repeats=2)
    compare(plan, run, peak_tflops=None)
    soar = ["soar 2 torch", "soar 3 torch, aux by 2"]
    assert order == ["sft 2 torch"] * 2 + soar + soar[::-1]


# --- failures --------------------------------------------------------------------------------


def test_a_failing_variant_is_recorded_and_the_others_go_on() -> None:
    kept: list[int] = []
    variants = (Variant(backend="te", fp8_recipe="current"), Variant())
    plan = Plan((small("sft"),), variants, (1,), with_reference=False, repeats=2, steps=1, warmup=1)
    said: list[str] = []
    (table,) = compare(
        plan, here, peak_tflops=None, say=said.append, keep=lambda t: kept.append(len(t))
    )
    failed, ours = table["sides"]
    assert "needs Transformer Engine" in failed["failed"] and "runs" not in failed
    assert len(ours["runs"]) == 2
    assert len(said) == 3 and len(kept) == 3  # the failing one was tried once


def test_memory_of_a_failure_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[weakref.ref[Any]] = []

    class OutOfMemory:
        def __init__(self, *_: object) -> None:
            self.itself = self  # modules are in circles, too
            left.append(weakref.ref(self))

        def step(self) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmany more lines")

    monkeypatch.setattr(measure, "OurSide", OutOfMemory)
    gc.disable()
    try:
        outcome = here(small(), OURS, 1, 1)
        assert left[0]() is None
    finally:
        gc.enable()
    assert outcome == Failure("OutOfMemoryError: CUDA out of memory.")


def test_a_loss_that_is_not_finite_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OurSide, "step", lambda self: torch.tensor(math.nan))
    outcome = here(small("sft"), OURS, 1, 1)
    assert isinstance(outcome, Failure) and "loss after 2 steps is nan" in outcome.reason


def test_outcomes_survive_json() -> None:
    assert outcome_from_json({"reason": "no"}) == Failure("no")
    record = {"seconds": [1.0], "held_bytes": 1, "peak_growth_bytes": 2, "loss": 0.5}
    assert outcome_from_json(record | {"ready_seconds": 3.0}) == Measured((1.0,), 1, 2, 0.5, 3.0)
    load = small()
    shape = {**vars(load.architecture), "dual_attention_layers": [0]}
    assert Load.from_json({**vars(load), "architecture": shape}) == load


# --- how variants are written ----------------------------------------------------------------


@pytest.mark.parametrize("variant", [*DEFAULTS["cuda"], *DEFAULTS["cpu"], CHECKPOINTED])
def test_a_variants_spec_gives_the_variant(variant: Variant) -> None:
    assert parse_variant(variant.spec) == variant


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("compil=on", "one of the keys side, backend"),
        ("compile", "KEY=VALUE"),
        ("compile=perhaps", "on or true or off or false"),
        ("micro_batch_size=0", "a whole number above 0"),
        ("backend=apex", "torch or te"),
        ("fp8_recipe=delayed", "add backend=te"),
        ("side=reference,compile=on", "leave the other keys out"),
        ("side=reference,activation_checkpointing=selective", "none or full"),
    ],
)
def test_wrong_variants_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_variant(spec)
    assert spec in str(caught.value)


# --- records and pictures --------------------------------------------------------------------


def test_the_first_records_can_still_be_read() -> None:
    record = read_record(ROOT / "benchmarks/results/2026-11-22_cpu_soar_step.json")
    (table,) = record["tables"]
    ratios = table["sides"][0]["ratios"]["same recomputation"]
    assert ratios["speed"] == pytest.approx(1.2360660)
    assert ratios["memory"] == pytest.approx(0.0986505)
    assert table["parameters"] == 25_121_344
    assert any("1.24x" in line for line in lines(record))


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("2026-11-25_cpu_data.json", "2026-11-29_cpu_checkpoint.json"):
        with pytest.raises(ConfigError, match="give one that gpu or cpu wrote"):
            read_record(ROOT / "benchmarks/results" / name)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_record(tmp_path / "broken.json")


def gpu_record(run: Callable[..., Any]) -> dict[str, Any]:
    load = published(ROOT / "configs/architectures/sd35_medium", "soar")
    tables = compare(Plan((load,), DEFAULTS["cuda"]), run, peak_tflops=989.0)
    rates = {"peak_tflops": 989.0, "matrix_tflops": 750.0}
    hardware = {"gpu": "NVIDIA H200", "cpu": "some"}
    return {
        "hardware": hardware,
        "versions": {"torch": "2"},
        "device": "cuda",
        "tables": tables,
    } | rates


def test_bounds_tables_and_pictures(tmp_path: Path) -> None:
    record = gpu_record(
        lambda _, v, *__: Failure("no <FP8> here") if v.fp8_recipe == "block" else faked(0.5)
    )
    (table,) = record["tables"]
    found = bounds(record, table)
    assert found["peak of the data sheet"] == pytest.approx(989 / (22 * 2.138), rel=1e-3)
    assert found["speed of large matrix products"] == pytest.approx(750 / (22 * 2.138), rel=1e-3)
    words = "\n".join(lines(record))
    assert "failed: no <FP8> here" in words and "1.00x" in words and "21.03" in words
    draw_picture(record, tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    for expected in ("TE, fp8 current", "no &lt;FP8&gt; here", "21.0", "NVIDIA H200", "8.00"):
        assert expected in picture
    draw_picture(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_record_of_failures_alone_can_be_shown(tmp_path: Path) -> None:
    record = gpu_record(lambda *_: Failure("no device"))
    assert sum("failed" in line for line in lines(record)) == len(record["tables"][0]["sides"])
    draw_picture(record, tmp_path / "picture.svg")
