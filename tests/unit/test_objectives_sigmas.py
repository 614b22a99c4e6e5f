"""Densities, grids and weights against the definition, diffusers' code and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from soar_mega.objectives.rollout import (
    aux_sigma,
    euler_step,
    guided_velocity,
    noisy_step,
    renoise_share,
)
from soar_mega.objectives.settings import ROLLOUT_TYPES, WEIGHTING_SCHEMES
from soar_mega.objectives.sigmas import SigmaGrid, draw_t, loss_weight, shift_sigma

F64 = torch.float64


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def drawn(scheme: str, count: int = 4096, **changes: float) -> torch.Tensor:
    numbers = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29} | changes
    return draw_t(scheme, 3, 0, torch.arange(count), **numbers)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
def test_the_table_is_the_schedulers_bit_for_bit(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = SigmaGrid("scheduler", shift, torch.float32)
    assert torch.equal(grid.table, scheduler.sigmas[:1000])
    assert torch.equal(1000 * grid.table, scheduler.timesteps)


def test_quantisation_takes_the_entry_below() -> None:
    grid = SigmaGrid("scheduler", 3.0, F64)
    t = times(1.0, 1 - 1e-6, 0.9992, 0.9982, 0.5002, 0.0012, 1e-6, 0.0)
    index = torch.tensor([0, 0, 0, 1, 499, 998, 999, 999])
    assert torch.equal(grid.sigma(t), grid.table[index])
    assert grid.table[0] == 1
    assert grid.sigma(times(0.0)) == pytest.approx(3 * 0.001 / 1.002, abs=1e-15)
    assert (grid.table.diff() < 0).all()


def test_the_continuous_grid_and_its_rounding() -> None:
    t = torch.linspace(0, 1, 101, dtype=F64)
    exact = 3 * t / (1 + 2 * t)
    torch.testing.assert_close(
        SigmaGrid("continuous", 3.0, F64).sigma(t), exact, rtol=1e-15, atol=0
    )
    rounded = SigmaGrid("continuous", 3.0, torch.float32).sigma(t)
    assert rounded.dtype == F64 and torch.equal(rounded, exact.float().double())
    assert shift_sigma(times(0.0, 1.0), 3.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("scheme", ["logit_normal", "mode"])
def test_t_of_a_slot_has_the_same_bits_in_any_batch(scheme: str) -> None:
    slots = torch.arange(200)
    numbers = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
    whole = draw_t(scheme, 3, 0, slots, **numbers)
    for size in (1, 2, 3, 7, 12, 100):
        parts = [draw_t(scheme, 3, 0, part, **numbers) for part in slots.split(size)]
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_weights_are_those_of_diffusers(scheme: str) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    sigma = torch.linspace(0.003, 1, 50, dtype=F64)
    expected = training_utils.compute_loss_weighting_for_sd3(scheme, sigma)
    torch.testing.assert_close(
        loss_weight(scheme, sigma, 0.00299), expected.double(), rtol=1e-6, atol=0
    )
    at_zero = loss_weight(scheme, times(0.0), 0.00299)
    assert torch.isfinite(at_zero).all()
    assert torch.equal(at_zero, loss_weight(scheme, times(0.00299), 0.00299))


def test_logit_normal_follows_its_distribution() -> None:
    """Kolmogorov-Smirnov at about 1 in 1000; a raised mean moves t towards 1, the noise."""
    for mean, std in ((0.0, 1.0), (1.0, 0.5)):
        t = drawn("logit_normal", logit_mean=mean, logit_std=std).sort().values
        cdf = 0.5 * (1 + torch.erf((torch.logit(t) - mean) / (std * math.sqrt(2))))
        steps = (torch.arange(4096) + 0.5) / 4096
        assert (cdf - steps).abs().max() < 1.95 / math.sqrt(4096)
    assert drawn("logit_normal", logit_mean=1.0).mean() > 0.65


def test_mode_is_the_papers_map_of_a_uniform_number() -> None:
    u = drawn("none")
    for scale in (1.29, 0.0, -0.5):
        expected = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        t = drawn("mode", mode_scale=scale)
        torch.testing.assert_close(t, expected, rtol=1e-12, atol=1e-15)
        assert ((t >= 0) & (t <= 1)).all()


@pytest.mark.parametrize("scheme", ["cosmap", "sigma_sqrt", "none"])
def test_the_other_schemes_draw_t_uniformly(scheme: str) -> None:
    t = drawn(scheme).sort().values
    steps = (torch.arange(4096) + 0.5) / 4096
    assert (t - steps).abs().max() < 1.95 / math.sqrt(4096)


def test_aux_sigma_keeps_its_bounds() -> None:
    draw = times(2**-24, 0.5, 1 - 2**-24)[:, None]
    sigma0, sigma1 = times(0.5, 0.0, 1.0, 0.5), times(0.4, 0.0, 1.0, 0.45)
    low, middle, high = aux_sigma(draw, sigma0, sigma1, 0.00299, None)
    lower = times(0.4, 0.00299, 1.0, 0.45)
    torch.testing.assert_close(low, lower, rtol=0, atol=1e-7)
    torch.testing.assert_close(middle, (lower + 1) / 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(high, torch.ones(4, dtype=F64), rtol=0, atol=1e-7)
    narrow = aux_sigma(draw, sigma0, sigma1, 0.00299, 0.5)[2]  # r sigma0 below lower: lower
    assert torch.equal(narrow, lower)
    wide = aux_sigma(draw, sigma0, sigma1, 0.00299, 1.5)[2]
    torch.testing.assert_close(wide, times(0.75, 0.00299, 1.0, 0.75), rtol=0, atol=1e-7)


def test_renoise_share_at_its_ends() -> None:
    share = renoise_share(times(0.4, 1.0, 0.7, 1.0), times(0.4, 0.4, 0.4, 1.0))
    torch.testing.assert_close(share, times(0.0, 1.0, 0.5, 0.0))


@pytest.mark.parametrize("kind", ROLLOUT_TYPES)
def test_steps_are_finite_at_every_corner(kind: str) -> None:
    corners = times(0.0, 1e-6, 0.003, 0.5, 1 - 1e-6, 1.0)
    below_one = float(SigmaGrid("scheduler", 3.0, F64).table[1])
    for scale in (0.0, 0.5, 1.0, 2.0):
        for end in (corners, 0.9 * corners, torch.zeros_like(corners)):
            step = noisy_step(kind, corners, end, scale, below_one)
            for numbers in (step.keep_less_one, step.push, step.shake):
                assert torch.isfinite(numbers).all()


@pytest.mark.parametrize("kind", ["simple", "cps", "flow_sde"])
def test_without_noise_the_other_paths_are_eulers(kind: str) -> None:
    sigma0, sigma1 = times(0.9, 0.5, 0.1, 0.0), times(0.8, 0.4, 0.0, 0.0)
    euler, other = euler_step(sigma0, sigma1), noisy_step(kind, sigma0, sigma1, 0.0, 0.9997)
    for name in ("keep_less_one", "push", "shake"):
        torch.testing.assert_close(getattr(other, name), getattr(euler, name), rtol=0, atol=1e-15)


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(ValueError, match="sde_rollout_type = 'heun'"):
        noisy_step("heun", times(0.5), times(0.4), 0.5, 0.9997)


def test_guidance() -> None:
    conditional, unconditional = times(2.0), times(1.0)
    assert [float(guided_velocity(conditional, unconditional, g)) for g in (0.0, 1.0, 4.5)] == [
        1.0,
        2.0,
        5.5,
    ]
