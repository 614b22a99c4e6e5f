"""The passes an objective declares, what enters the model, and the settings refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.objectives import FlowMatching, Soar, make_objective
from soar_mega.objectives.settings import SIGMA_GRIDS
from soar_mega.passes import MicroBatch, Objective, Pass
from tests.unit.soar_reference import (
    SEED,
    SHIFT,
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


# --- passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["base", "rollout", "aux0", "aux1"]),
        ({"cfg_scale_sampling": 1.0}, ["base", "aux0", "aux1"]),
        ({"reuse_base_forward": False}, ["base", "rollout_cond", "rollout", "aux0", "aux1"]),
        (
            {"reuse_base_forward": False, "cfg_scale_sampling": 1.0},
            ["base", "rollout_cond", "aux0", "aux1"],
        ),
        ({"aux_group_size": 9}, ["base", "rollout", "aux0"]),
        ({"lambda_aux": 0.0}, ["base"]),
        ({"trajectory_length": 0, "reuse_base_forward": False}, ["base"]),
        ({"name": "flow_matching"}, ["base"]),
    ],
)
def test_the_passes(changes: dict[str, Any], names: list[str]) -> None:
    passes = build(**changes).passes()
    assert [p.name for p in passes] == names
    before = tuple(name for name in names if not name.startswith("aux"))
    for p in passes:
        assert p.grad == (p.kind != "rollout")
        assert p.kind == ("aux" if p.name.startswith("aux") else p.name.split("_")[0])
        assert p.after == (before if p.kind == "aux" else ())


def test_groups_cover_every_state_once_with_a_short_last_one() -> None:
    objective = build(num_rollout_paths=3, trajectory_length=3, aux_group_size=4)
    groups = [p for p in objective.passes() if p.kind == "aux"]
    assert [(p.first, p.states) for p in groups] == [(0, 4), (4, 4), (8, 1)]


# --- inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", SIGMA_GRIDS)
def test_the_timestep_is_exactly_1000_sigma(grid: str, dtype: torch.dtype) -> None:
    objective = build(dtype, sigma_grid=grid, num_rollout_paths=3, aux_group_size=4)
    state, _ = run(objective, SmallModel().to(dtype), micro_of(dtype=dtype))
    seen = []
    for p in objective.passes():
        x = objective.make_input(p, state)
        assert x.timestep_B.dtype == x.latent_BCHW.dtype == dtype
        assert x.timestep_B.shape == (p.states * 4,) == (len(x.latent_BCHW),)
        sigma = (
            state.sigma_KB[p.first : p.first + p.states].flatten()
            if p.kind == "aux"
            else state.sigma_B
        )
        assert torch.equal(x.timestep_B, 1000 * sigma)
        if p.kind == "aux":
            seen.append(sigma)
        else:  # the latents are those of that very sigma
            mixed = (1 - sigma[:, None, None, None]) * state.clean_BCHW
            mixed = mixed + sigma[:, None, None, None] * state.noise_BCHW
            assert torch.equal(x.latent_BCHW, mixed)
    assert torch.cat(seen).unique().numel() == 3 * 2 * 4
    if grid == "scheduler":
        assert torch.isin(state.sigma_B, objective.grid.table).all()


def test_rows_are_state_major() -> None:
    objective = build(num_rollout_paths=2, trajectory_length=3, aux_group_size=5)
    single = build(num_rollout_paths=2, trajectory_length=3, aux_group_size=1)
    state, _ = run(objective, SmallModel(), micro_of())
    state1, _ = run(single, SmallModel(), micro_of())
    grouped = [objective.make_input(p, state) for p in objective.passes() if p.kind == "aux"]
    alone = [single.make_input(p, state1) for p in single.passes() if p.kind == "aux"]
    for name in ("latent_BCHW", "timestep_B"):
        joined = torch.cat([getattr(x, name) for x in grouped])
        assert torch.equal(joined, torch.cat([getattr(x, name) for x in alone]))
    for name in ("text_BTE", "pooled_BV"):
        joined = torch.cat([getattr(x.condition, name) for x in grouped])
        assert torch.equal(joined, torch.cat([getattr(x.condition, name) for x in alone]))


def test_a_dropped_prompt_is_dropped_for_its_sample_alone_and_in_every_pass() -> None:
    objective = build(cond_dropout_rate=0.4, aux_group_size=2, reuse_base_forward=False)
    samples, empty = make_samples(64)
    micro = make_micro(samples, empty, torch.float64)
    state, _ = run(objective, SmallModel(), micro)
    dropped = state.empty_prompt_B
    assert 12 < int(dropped.sum()) < 40
    for p in objective.passes():
        condition = objective.make_input(p, state).condition
        for given, prompt, nothing in (
            (condition.text_BTE, micro.prompt.text_BTE, empty.text_BTE),
            (condition.pooled_BV, micro.prompt.pooled_BV, empty.pooled_BV),
        ):
            rows = given.unflatten(0, (p.states, 64))
            if p.name == "rollout":
                assert torch.equal(rows[0], nothing.expand_as(prompt))
                continue
            for state_rows in rows:
                assert torch.equal(state_rows[dropped], nothing.expand_as(prompt[dropped]))
                assert torch.equal(state_rows[~dropped], prompt[~dropped])


@pytest.mark.parametrize(("rate", "expected"), [(0.0, False), (1.0, True)])
def test_dropout_of_none_and_of_all(rate: float, expected: bool) -> None:
    state = build(cond_dropout_rate=rate).begin(micro_of(make_samples(200)[0]))
    assert (state.empty_prompt_B == expected).all()


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dpo"}, "'dpo' is neither"),
        ({"weighting_scheme": "cosine"}, "weighting_scheme = 'cosine' must be one of logit_normal"),
        ({"sigma_grid": "log"}, "sigma_grid = 'log' must be one of"),
        ({"sde_rollout_type": "ode"}, "sde_rollout_type = 'ode' must be one of sde"),
        ({"min_aux_sigma": 0.0}, "min_aux_sigma = 0.0 must be above 0"),
        ({"num_sampling_steps": 1001}, "num_sampling_steps = 1001 must be 1 to 1000"),
        ({"num_sampling_steps": 0}, "num_sampling_steps = 0 must be 1 to 1000"),
        ({"num_rollout_paths": 0}, "num_rollout_paths = 0 must be 1 to"),
        ({"trajectory_length": -1}, "trajectory_length = -1 must be 0 to"),
        ({"lambda_aux": -0.5}, "lambda_aux = -0.5 must be"),
        ({"lambda_aux": float("nan")}, "lambda_aux = nan must be"),
        ({"aux_group_size": 0}, "aux_group_size = 0 must be at least 1"),
        ({"cond_dropout_rate": 1.5}, "cond_dropout_rate = 1.5 must be 0 to 1"),
        ({"sigma_upper_ratio": 0.0}, "sigma_upper_ratio = 0.0 must be null"),
        ({"logit_std": -1.0}, "logit_std = -1.0 must be"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_bad_shift_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shift = 0\.0 must be"):
        make_objective(settings(), shift=0.0, seed=1)


def test_soar_without_auxiliary_terms_is_flow_matching_itself() -> None:
    assert type(build(lambda_aux=0.0)) is FlowMatching
    assert type(build(trajectory_length=0)) is FlowMatching
    assert type(build()) is Soar
    with pytest.raises(ValueError, match="leave no auxiliary term"):
        Soar(settings(lambda_aux=0.0), shift=SHIFT, seed=SEED)
    with pytest.raises(RuntimeError, match="no guided velocity"):
        build(lambda_aux=0.0).hand_over(None)


def test_a_pass_is_a_plain_value() -> None:
    assert build().passes()[0] == Pass("base", "base", grad=True)
