"""Losses and gradients against the plain fp64 loop, for every way of cutting a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from soar_mega.objectives import make_objective
from soar_mega.objectives.settings import ROLLOUT_TYPES, SIGMA_GRIDS, WEIGHTING_SCHEMES
from tests.unit.soar_reference import (
    SEED,
    SHIFT,
    STEP,
    Reference,
    SmallModel,
    make_micro,
    make_samples,
    reference_step,
    settings,
)

BATCH = 5
SAMPLES, EMPTY = make_samples(BATCH)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
Times = Callable[[int], float] | None


def run_step(
    config: Any,
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    t0: Times = None,
    step: int = STEP,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """Loss, gradients, base terms, auxiliary terms and counts of a step cut into ``sizes``."""
    objective: Any = make_objective(config, shift=SHIFT, seed=SEED, dtype=dtype)
    if t0 is not None:
        objective.draw_t0 = lambda step, slots_B: torch.tensor(
            [t0(int(slot)) for slot in slots_B], dtype=torch.float64
        )
    model = SmallModel().to(dtype)
    ends = list(itertools.accumulate(sizes))
    micros = [
        make_micro(SAMPLES[end - size : end], EMPTY, dtype, step)
        for size, end in zip(sizes, ends, strict=True)
    ]
    counts = torch.stack([objective.count(micro) for micro in micros]).sum(0)
    normaliser = objective.normaliser(counts)
    loss = torch.zeros((), dtype=torch.float64)
    terms = []
    for micro in micros:
        state = objective.begin(micro)
        for p in objective.passes():
            with torch.set_grad_enabled(p.grad):
                out = model(objective.make_input(p, state))
            part = objective.take_output(p, state, out, normaliser)
            assert (part is not None) == p.grad
            if part is not None:
                assert part.dtype == dtype
                part.backward()
                loss += part.detach()
        terms.append(objective.terms(state))
    gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
    base = torch.cat([term.base_B for term in terms])
    aux = torch.cat([term.aux_KB for term in terms], dim=1)
    return loss, gradients, base, aux, counts


def reference_of(config: Any, t0: Times = None) -> tuple[Reference, list[Tensor]]:
    model = SmallModel()
    result = reference_step(model, config, SAMPLES, EMPTY, t0=t0)
    result.loss.backward()
    return result, [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(
    config: Any,
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    t0: Times = None,
    against: tuple[Reference, list[Tensor]] | None = None,
) -> None:
    expected, expected_gradients = against or reference_of(config, t0)
    loss, gradients, base, aux, counts = run_step(config, sizes, dtype, t0)
    tolerance = TOLERANCE[dtype]
    assert counts.tolist() == [expected.base_terms, expected.aux_terms]
    assert abs(loss - expected.loss) <= tolerance * abs(expected.loss)
    whole = torch.cat([g.flatten() for g in expected_gradients]).norm()
    assert whole > 0
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).norm() <= tolerance * max(wanted.norm(), 1e-3 * whole)
    torch.testing.assert_close(base, expected.base, rtol=tolerance, atol=0)
    if expected.aux_terms:
        torch.testing.assert_close(aux, expected.aux, rtol=tolerance, atol=0)


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Every way of cutting ``total`` consecutive samples into microbatches."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in compositions(total - first):
            yield (first, *rest)


@pytest.mark.parametrize("grid", SIGMA_GRIDS)
@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
@pytest.mark.parametrize("kind", ROLLOUT_TYPES)
def test_every_type_scheme_and_grid(kind: str, scheme: str, grid: str) -> None:
    config = settings(
        sde_rollout_type=kind, weighting_scheme=scheme, sigma_grid=grid, num_rollout_paths=3
    )
    against = reference_of(config)
    assert_same(config, (2, 3), against=against)
    assert_same(config, (2, 3), torch.float32, against=against)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("paths", [1, 3])
def test_every_split_and_group_size(paths: int, reuse: bool) -> None:
    config = settings(
        num_rollout_paths=paths, reuse_base_forward=reuse, sde_rollout_type="flow_sde"
    )
    against = reference_of(config)
    for sizes in compositions(BATCH):
        config.aux_group_size = 1 + len(sizes) % (2 * paths)
        assert_same(config, sizes, against=against)
    for group in range(1, 2 * paths + 2):
        config.aux_group_size = group
        assert_same(config, (2, 3), against=against)
    for group in (1, 2 * paths):
        config.aux_group_size = group
        assert_same(config, (1, 4), torch.float32, against=against)


@pytest.mark.parametrize("grid", SIGMA_GRIDS)
@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
@pytest.mark.parametrize("states", ["ideal", "independent"])
def test_controls_without_a_rollout(states: str, scheme: str, grid: str) -> None:
    """As many states and terms as SOAR's, and no pass that is not one of them."""
    config = settings(
        aux_states=states, weighting_scheme=scheme, sigma_grid=grid, num_rollout_paths=2
    )
    against = reference_of(config)
    objective = make_objective(config, shift=SHIFT, seed=SEED)
    assert [p.name for p in objective.passes()] == ["base", "aux0", "aux1", "aux2", "aux3"]
    assert not any(p.after for p in objective.passes())
    for group, sizes in ((1, (5,)), (3, (2, 3)), (4, (1, 4))):
        config.aux_group_size = group
        assert_same(config, sizes, against=against)
        assert_same(config, sizes, torch.float32, against=against)


def test_independent_states_are_more_draws_of_sft() -> None:
    """With weight 1 the loss is the mean over 1 + N draws, each as likely as the base's."""
    sizes, tries = (BATCH,), 100
    config = settings(aux_states="independent", lambda_aux=1.0, trajectory_length=1)
    losses = torch.zeros(2, tries, dtype=torch.float64)
    for trial in range(tries):
        _, _, base, aux, _ = run_step(config, sizes, step=trial)
        losses[:, trial] = torch.stack([base.mean(), aux.mean()])
    first, second = losses
    error = ((first.var() + second.var()) / tries).sqrt()
    assert abs(first.mean() - second.mean()) < 3 * error
    assert abs(torch.corrcoef(losses)[0, 1]) < 0.9  # not the same draws


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.sampled_from(list(compositions(BATCH))),
    group=st.integers(1, 9),
    paths=st.sampled_from([1, 3]),
    length=st.integers(1, 3),
    reuse=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 4.5]),
    kind=st.sampled_from(ROLLOUT_TYPES),
    scheme=st.sampled_from(WEIGHTING_SCHEMES),
    grid=st.sampled_from(SIGMA_GRIDS),
    ratio=st.sampled_from([None, 0.01, 1.0, 1.5]),
    steps=st.sampled_from([1, 4, 40, 1000]),
    noise=st.sampled_from([0.0, 0.5, 1.0, 1.3]),
    dropout=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_result_does_not_depend_on_the_cut(
    sizes: tuple[int, ...],
    group: int,
    paths: int,
    length: int,
    reuse: bool,
    scale: float,
    kind: str,
    scheme: str,
    grid: str,
    ratio: float | None,
    steps: int,
    noise: float,
    dropout: float,
) -> None:
    config = settings(
        aux_group_size=group,
        num_rollout_paths=paths,
        trajectory_length=length,
        reuse_base_forward=reuse,
        cfg_scale_sampling=scale,
        sde_rollout_type=kind,
        weighting_scheme=scheme,
        sigma_grid=grid,
        sigma_upper_ratio=ratio,
        num_sampling_steps=steps,
        sde_noise_scale=noise,
        cond_dropout_rate=dropout,
    )
    assert_same(config, sizes)


@pytest.mark.parametrize("grid", SIGMA_GRIDS)
@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
@pytest.mark.parametrize("kind", ROLLOUT_TYPES)
def test_the_ends_of_t(kind: str, scheme: str, grid: str) -> None:
    """t0 at and near 0 and 1 in one batch: finite, and what the plain loop says."""
    times = [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0]
    config = settings(
        sde_rollout_type=kind,
        weighting_scheme=scheme,
        sigma_grid=grid,
        num_rollout_paths=3,
        aux_group_size=4,
    )

    def t0(slot: int) -> float:
        return times[slot - SAMPLES[0].slot]

    for steps in (40, 1000):
        config.num_sampling_steps = steps
        assert_same(config, (2, 3), t0=t0)
        _, gradients, _, _, counts = run_step(config, (2, 3), torch.float32, t0)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        # t1 = 0 for the first two samples: their paths 1 and 2 do not count.
        assert counts.tolist() == [5, 5 * 2 + 3 * 4]


@pytest.mark.parametrize("grid", SIGMA_GRIDS)
@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_flow_matching(scheme: str, grid: str) -> None:
    config = settings(
        name="flow_matching", weighting_scheme=scheme, sigma_grid=grid, lambda_aux=0.0
    )
    assert_same(config, (5,))
    assert_same(config, (1, 3, 1))
    assert_same(config, (2, 3), torch.float32)


@pytest.mark.parametrize("off", [{"lambda_aux": 0.0}, {"trajectory_length": 0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_auxiliary_terms_soar_is_fine_tuning_bit_for_bit(
    off: dict[str, Any], dtype: torch.dtype
) -> None:
    plain = make_objective(settings(name="flow_matching"), shift=SHIFT, seed=SEED, dtype=dtype)
    soar = make_objective(settings(**off), shift=SHIFT, seed=SEED, dtype=dtype)
    assert [p.name for p in soar.passes()] == [p.name for p in plain.passes()] == ["base"]
    loss, gradients, base, aux, counts = run_step(settings(name="flow_matching"), (2, 3), dtype)
    loss2, gradients2, base2, aux2, counts2 = run_step(settings(**off), (2, 3), dtype)
    assert torch.equal(loss, loss2) and torch.equal(base, base2) and torch.equal(counts, counts2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))
    assert aux.shape == aux2.shape == (0, BATCH)
