"""What SOAR's loss is minimal at, for data that allow it to be worked out.

For z0 ~ N(0, 1) and noise of the same size everything is Gaussian, the best velocity is k(sigma) z,
and k is a ratio of second moments: over the base states of a level, and over the auxiliary states
there, which depend on k themselves (a fixed point). docs/soar_vs_sft.md quotes the table.

Legend: B samples, N auxiliary states each, L noise levels.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from soar_mega.objectives.rollout import aux_sigma, euler_step, renoise_share
from soar_mega.objectives.sigmas import shift_sigma

SHIFT, SAMPLES, STATES, LEVELS = 3.0, 60_000, 6, 200
FLOOR = 0.00299

# Standard deviation of what K Euler steps end at, data have 1: after flow matching, after SOAR.
TABLE = {5: (0.685, 0.421), 10: (0.833, 0.663), 20: (0.913, 0.813), 40: (0.956, 0.903)}


def at(levels_L: Tensor, k_L: Tensor, sigma: Tensor) -> Tensor:
    """k at any sigma, linear between levels."""
    right = torch.searchsorted(levels_L, sigma.contiguous()).clamp(1, len(levels_L) - 1)
    low, high = levels_L[right - 1], levels_L[right]
    share = ((sigma - low) / (high - low)).clamp(0, 1)
    return k_L[right - 1] + share * (k_L[right] - k_L[right - 1])


def by_level(sigma: Tensor, value: Tensor) -> Tensor:
    """Sums over the samples of each level."""
    level = (sigma * LEVELS).long().clamp(0, LEVELS - 1)
    sums = torch.zeros(LEVELS, dtype=torch.float64)
    return sums.index_add(0, level.flatten(), value.expand_as(sigma).flatten())


def best_velocity(steps: int, states: int, *, rolled: bool = True) -> tuple[Tensor, Tensor]:
    """Levels and k at them: the minimum of SOAR's loss with ``states`` auxiliary states."""
    generator = torch.Generator().manual_seed(0)
    t0_B = torch.sigmoid(torch.randn(SAMPLES, dtype=torch.float64, generator=generator))
    sigma0_B = shift_sigma(t0_B, SHIFT)
    sigma1_B = shift_sigma((t0_B - 1 / steps).clamp_min(0), SHIFT)
    draw_NB = torch.rand(states, SAMPLES, dtype=torch.float64, generator=generator)
    sigma_NB = aux_sigma(draw_NB, sigma0_B, sigma1_B, FLOOR, None)
    share_NB = renoise_share(sigma_NB, sigma1_B)

    levels_L = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    # E[v z] and E[z z] of z = (1 - sigma) z0 + sigma z1 and v = z1 - z0.
    base_vz_L = by_level(sigma0_B, 2 * sigma0_B - 1)
    base_zz_L = by_level(sigma0_B, (1 - sigma0_B) ** 2 + sigma0_B**2)
    k_L = (2 * levels_L - 1) / ((1 - levels_L) ** 2 + levels_L**2)
    for _ in range(40 if states else 0):
        push_B = euler_step(sigma0_B, sigma1_B).push if rolled else sigma1_B * 0
        grown_B = 1 + push_B * at(levels_L, k_L, sigma0_B)
        start_B = sigma0_B if rolled else sigma1_B
        clean_NB = (1 - share_NB) * grown_B * (1 - start_B)  # z_k = clean z0 + noise z1
        noise_NB = (1 - share_NB) * grown_B * start_B + share_NB
        aux_vz_NB = ((clean_NB - 1) * clean_NB + noise_NB**2) / sigma_NB
        aux_vz_L = by_level(sigma_NB, aux_vz_NB)
        aux_zz_L = by_level(sigma_NB, clean_NB**2 + noise_NB**2)
        vz_L, zz_L = base_vz_L + aux_vz_L, base_zz_L + aux_zz_L
        best_L = torch.where(zz_L > 0, vz_L / zz_L, k_L)  # no sample near sigma 0: as it was
        k_L = (k_L + best_L) / 2
    return levels_L, k_L


def end_deviation(levels_L: Tensor, k_L: Tensor, steps: int) -> float:
    """Standard deviation after ``steps`` Euler steps from N(0, 1)."""
    sigmas = shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), SHIFT)
    deviation = torch.ones((), dtype=torch.float64)
    for sigma, following in pairwise(sigmas):
        deviation = deviation * (1 + (following - sigma) * at(levels_L, k_L, sigma.view(1))[0])
    return float(deviation)


@pytest.mark.parametrize("steps", TABLE)
def test_soar_ends_narrower_than_flow_matching_the_more_the_larger_its_step(steps: int) -> None:
    flow, soar = (end_deviation(*best_velocity(steps, n), steps) for n in (0, STATES))
    assert (flow, soar) == pytest.approx(TABLE[steps], abs=0.004)


def test_ideal_states_in_the_place_of_rolled_ones_leave_the_optimum_where_it_was() -> None:
    ideal = end_deviation(*best_velocity(10, STATES, rolled=False), 10)
    assert ideal == pytest.approx(TABLE[10][0], abs=0.002)


def test_the_exact_flow_has_no_step_to_be_narrow_by() -> None:
    assert end_deviation(*best_velocity(10, 0), 2000) == pytest.approx(1, abs=0.005)
