"""What an objective keeps, hands over and leaves alone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.objectives import make_objective
from soar_mega.objectives.settings import ROLLOUT_TYPES, SIGMA_GRIDS
from soar_mega.passes import MicroBatch, ModelInput, Objective, TextCondition
from tests.unit.soar_reference import (
    SEED,
    SHIFT,
    STEP,
    Sample,
    SmallModel,
    make_micro,
    make_samples,
    settings,
)

SAMPLES, EMPTY = make_samples(4)


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return make_objective(settings(**changes), shift=SHIFT, seed=SEED, dtype=dtype)


def micro_of(samples: list[Sample] = SAMPLES, dtype: torch.dtype = torch.float64) -> MicroBatch:
    return make_micro(samples, EMPTY, dtype)


def run(objective: Objective, model: SmallModel, micro: MicroBatch) -> tuple[Any, list[Tensor]]:
    state = objective.begin(micro)
    normaliser = objective.normaliser(objective.count(micro))
    for p in objective.passes():
        with torch.set_grad_enabled(p.grad):
            out = model(objective.make_input(p, state))
        loss = objective.take_output(p, state, out, normaliser)
        if loss is not None:
            loss.backward()
    return state, [parameter.grad for parameter in model.parameters()]  # type: ignore[misc]


# --- the exact velocity field -----------------------------------------------------------------


@pytest.mark.parametrize("grid", SIGMA_GRIDS)
@pytest.mark.parametrize("kind", ROLLOUT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_model_stays_on_the_ideal_path(kind: str, grid: str, dtype: torch.dtype) -> None:
    objective = build(
        dtype,
        sde_rollout_type=kind,
        sde_noise_scale=0.0,
        sigma_grid=grid,
        num_rollout_paths=3,
        trajectory_length=3,
        aux_group_size=3,  # one path a pass
    )
    micro = micro_of(dtype=dtype)
    state = objective.begin(micro)
    exact = state.noise_BCHW - state.clean_BCHW
    one = torch.ones((), dtype=dtype)
    slack = 20 * torch.finfo(dtype).eps
    for p in objective.passes():
        x = objective.make_input(p, state)
        sigma = (x.timestep_B / 1000)[:, None, None, None]
        loss = objective.take_output(p, state, exact.repeat(p.states, 1, 1, 1), one)
        if p.kind == "rollout":
            continue
        ideal = state.clean_BCHW.repeat(p.states, 1, 1, 1)
        ideal = (1 - sigma) * ideal + sigma * state.noise_BCHW.repeat(p.states, 1, 1, 1)
        if kind == "sde" and p.first > 0:  # it always replaces the noise
            assert loss > 0.01
            assert (x.latent_BCHW - ideal).abs().max() > 0.01
        else:
            assert loss < (slack / 0.003) ** 2
            torch.testing.assert_close(x.latent_BCHW, ideal, rtol=slack, atol=slack)


class Token:
    pass


# --- no trace of the rollout ------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
def test_the_rollout_keeps_no_graph_and_touches_no_generator(reuse: bool) -> None:
    objective = build(reuse_base_forward=reuse)
    model, micro = SmallModel(), micro_of()
    before = torch.get_rng_state()
    state = objective.begin(micro)
    normaliser = objective.normaliser(objective.count(micro))
    packed: list[str] = []
    current = ""
    graphs: list[weakref.ref[Any]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(current)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for p in objective.passes():
            current = p.name
            x = objective.make_input(p, state)
            assert not x.latent_BCHW.requires_grad and not x.timestep_B.requires_grad
            with torch.set_grad_enabled(p.grad):
                out = model(x)
            loss = objective.take_output(p, state, out, normaliser)
            if p.grad:
                assert loss is not None
                out.grad_fn.metadata["token"] = token = Token()  # dies with the graph
                graphs.append(weakref.ref(token))
                del token
                loss.backward()
            else:
                assert loss is None and out.grad_fn is None
            del out, loss, x
            gc.collect()
            assert all(graph() is None for graph in graphs), "a graph outlives its pass"
    assert {name for name in packed if name} == {"base", "aux0", "aux1"}
    guided = objective.hand_over(state)
    assert guided.grad_fn is None and not guided.requires_grad
    assert not state.halves
    held = [value for value in vars(state).values() if isinstance(value, Tensor)]
    held += list(state.aux_term_SB.values())
    assert len(held) > 10 and not any(tensor.requires_grad for tensor in held)
    assert torch.equal(before, torch.get_rng_state())


def test_a_schedule_may_put_the_rollout_before_the_base() -> None:
    objective = build()
    model, micro = SmallModel(), micro_of()
    one = torch.ones((), dtype=torch.float64)
    base, rollout = objective.passes()[:2]
    assert base.after == rollout.after == ()
    guided = []
    for order in ((base, rollout), (rollout, base)):
        state = objective.begin(micro)
        for p in order:
            with torch.set_grad_enabled(p.grad):
                objective.take_output(p, state, model(objective.make_input(p, state)), one)
        guided.append(objective.hand_over(state))
    assert torch.equal(*guided)


def test_terms_and_hand_over_refuse_to_come_too_early() -> None:
    objective = build()
    state = objective.begin(micro_of())
    with pytest.raises(RuntimeError, match="before the base pass"):
        objective.terms(state)
    with pytest.raises(RuntimeError, match="before the rollout was done"):
        objective.hand_over(state)
    aux = objective.passes()[2]
    with pytest.raises(RuntimeError, match="before the rollout was done"):
        objective.make_input(aux, state)


class BFloatModel(SmallModel):
    def forward(self, x: ModelInput) -> Tensor:
        return super().forward(x).bfloat16()


def test_both_ends_of_a_pipeline_go_on_from_the_same_bits() -> None:
    objective = build(torch.float32, num_rollout_paths=3, aux_group_size=4)
    model, micro = BFloatModel().float(), micro_of(dtype=torch.float32)
    single, gradients = run(objective, model, micro)
    first, last = objective.begin(micro), objective.begin(micro)
    normaliser = objective.normaliser(objective.count(micro))
    losses = []
    model.zero_grad()
    for p in objective.passes():
        if p.name == "aux0":
            sent = objective.hand_over(last)
            assert sent.dtype == torch.bfloat16 and sent.shape == micro.clean_BCHW.shape
            objective.receive(first, sent)
        x = objective.make_input(p, first)
        assert torch.equal(x.latent_BCHW, objective.make_input(p, single).latent_BCHW)
        assert x.latent_BCHW.dtype == torch.float32
        with torch.set_grad_enabled(p.grad):
            out = model(x)
        loss = objective.take_output(p, last, out, normaliser)
        if loss is not None:
            loss.backward()
            losses.append(loss)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    assert torch.equal(objective.terms(last).aux_KB, objective.terms(single).aux_KB)


# --- placeholders, counts ---------------------------------------------------------------------


def placeholder(slot: int) -> Sample:
    nan = float("nan")
    sample = SAMPLES[0]
    return Sample(
        slot,
        sample.clean * nan,
        sample.text * nan,
        sample.pooled * nan,
        real=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_placeholder_of_nan_changes_nothing(dtype: torch.dtype) -> None:
    objective = build(dtype, num_rollout_paths=3, aux_group_size=2)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    with_it = [*SAMPLES[:2], placeholder(99), *SAMPLES[2:]]
    state, gradients = run(objective, SmallModel().to(dtype), micro_of(with_it, dtype))
    alone, expected = run(objective, SmallModel().to(dtype), micro_of(dtype=dtype))
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)
    terms, terms_alone = objective.terms(state), objective.terms(alone)
    assert terms.base_B[2] == 0 and terms.base_counted_B.tolist() == [1, 1, 0, 1, 1]
    assert (terms.aux_KB[:, 2] == 0).all() and (terms.aux_counted_KB[:, 2] == 0).all()
    kept = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(terms.base_B[kept], terms_alone.base_B)
    torch.testing.assert_close(terms.aux_KB[:, kept], terms_alone.aux_KB)


@pytest.mark.parametrize("name", ["soar", "flow_matching"])
def test_a_batch_of_placeholders_alone_gives_zero_not_nan(name: str) -> None:
    objective = build(name=name)
    micro = micro_of([placeholder(1), placeholder(2)])
    assert objective.count(micro).tolist() == [0, 0]
    state, gradients = run(objective, SmallModel(), micro)
    assert all((gradient == 0).all() for gradient in gradients)
    normaliser = objective.normaliser(objective.count(micro))
    out = torch.zeros_like(micro.clean_BCHW)
    assert normaliser == 1
    assert objective.take_output(objective.passes()[0], state, out, normaliser) == 0


def test_a_sick_model_output_is_not_hidden() -> None:
    objective = build()
    micro = micro_of()
    state = objective.begin(micro)
    out = torch.zeros_like(micro.clean_BCHW)
    out[1] = float("nan")
    one = torch.ones((), dtype=torch.float64)
    assert torch.isnan(objective.take_output(objective.passes()[0], state, out, one))


def test_counts_are_known_before_any_forward_and_match_the_terms() -> None:
    objective = build(num_rollout_paths=3, trajectory_length=2)
    times = {3: 0.01, 4: 0.5, 5: 0.025, 6: 0.9}  # 0.025 - 1/40 = 0: two samples with t1 = 0
    objective.draw_t0 = lambda step, slots_B: torch.tensor(
        [times[int(slot)] for slot in slots_B], dtype=torch.float64
    )
    micro = micro_of()
    counts = objective.count(micro)
    assert counts.dtype == torch.float64 and counts.tolist() == [4, 4 * 2 + 2 * 4]
    state, _ = run(objective, SmallModel(), micro)
    terms = objective.terms(state)
    assert counts.tolist() == [terms.base_counted_B.sum(), terms.aux_counted_KB.sum()]
    assert ((terms.aux_KB > 0) == (terms.aux_counted_KB > 0)).all()
    assert objective.normaliser(counts) == 4 + 0.7 * 16


def test_the_reported_terms_add_up_to_the_loss() -> None:
    objective = build(num_rollout_paths=3)
    micro, model = micro_of(), SmallModel()
    state = objective.begin(micro)
    normaliser = objective.normaliser(objective.count(micro))
    total = torch.zeros((), dtype=torch.float64)
    for p in objective.passes():
        out = model(objective.make_input(p, state)).detach()
        loss = objective.take_output(p, state, out, normaliser)
        if loss is not None:
            total += loss
    terms = objective.terms(state)
    assert terms.base_B.dtype == terms.aux_KB.dtype == torch.float64
    expected = (terms.base_B.sum() + 0.7 * terms.aux_KB.sum()) / normaliser
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


# --- draws (failure case 26) ------------------------------------------------------------------


def draws(slots: list[int], step: int = STEP, seed: int = SEED) -> dict[str, Tensor]:
    """Everything random of some slots, one row a slot."""
    objective: Any = make_objective(settings(num_rollout_paths=3), shift=SHIFT, seed=seed)
    samples = [Sample(s, SAMPLES[0].clean, SAMPLES[0].text, SAMPLES[0].pooled) for s in slots]
    state = objective.begin(make_micro(samples, EMPTY, torch.float32, step))
    objective.receive(state, torch.zeros_like(state.clean_BCHW))
    rolled = torch.stack([objective._roll(m, state) for m in range(3)], dim=1)
    return {
        "noise": state.noise_BCHW,
        "sigma0": state.sigma_B,
        "sigma_k": state.sigma_KB.mT,
        "rolled": rolled,
        "dropped": state.empty_prompt_B,
    }


def test_draws_belong_to_the_slot_whoever_draws_them() -> None:
    slots = list(range(8))
    whole = draws(slots)
    for cut in ([8], [4, 4], [1] * 8, [3, 5], [5, 2, 1]):
        parts, start = [], 0
        for size in cut:
            parts.append(draws(slots[start : start + size]))
            start += size
        for name, expected in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), expected), name
    shuffled = draws([5, 0, 7])
    for name, expected in whole.items():
        assert torch.equal(shuffled[name], expected[[5, 0, 7]]), name


def test_draws_differ_over_slots_steps_seeds_and_states() -> None:
    drawn = [
        draws(list(range(16))),
        draws(list(range(16)), STEP + 1),
        draws(list(range(16)), seed=5),
    ]
    for name in ("noise", "rolled"):
        rows = torch.cat([one[name].flatten(1) for one in drawn])
        assert len(rows.unique(dim=0)) == 48, name
    sigma_k = torch.cat([one["sigma_k"] for one in drawn])
    assert sigma_k.unique().numel() == 48 * 6
    assert all(one["dropped"].any() and not one["dropped"].all() for one in drawn)
    # A resumed run starts at its own step: step 7 drawn again is step 7, not step 0.
    again = draws(list(range(16)))
    assert all(torch.equal(again[name], drawn[0][name]) for name in again)


def test_rollout_paths_have_noise_of_their_own() -> None:
    rolled = draws([0, 1])["rolled"]
    assert not torch.equal(rolled[:, 0], rolled[:, 1])
    assert not torch.equal(rolled[:, 1], rolled[:, 2])


# --- no host synchronisation ------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
def test_nothing_is_read_back_from_the_device(reuse: bool) -> None:
    """Tensors on the meta device have no values: any read raises."""
    objective = build(
        torch.float32, num_rollout_paths=3, aux_group_size=4, reuse_base_forward=reuse
    )
    real = micro_of(dtype=torch.float32)

    def condition(c: TextCondition) -> TextCondition:
        return TextCondition(c.text_BTE.to("meta"), c.pooled_BV.to("meta"))

    micro = MicroBatch(
        step=real.step,
        slots_B=real.slots_B,
        clean_BCHW=real.clean_BCHW.to("meta"),
        prompt=condition(real.prompt),
        empty=condition(real.empty),
        weight_B=real.weight_B.to("meta"),
    )
    state = objective.begin(micro)
    normaliser = objective.normaliser(objective.count(micro))
    model = SmallModel().float().to("meta")
    for p in objective.passes():
        x = objective.make_input(p, state)
        assert x.latent_BCHW.is_meta and x.timestep_B.is_meta
        loss = objective.take_output(p, state, model(x), normaliser)
        assert loss is None or (loss.is_meta and loss.shape == ())
    assert objective.terms(state).aux_KB.shape == (6, 4)
