"""What ``exposure_bias.measure`` found, as means over samples with standard errors: plain JSON.

A *curve* is ``{"mean": [...], "error": [...]}``, one entry a noise level, None where there is
nothing; a *number* the same without lists. Differences between models are taken sample by sample:
all models saw the same samples and the same noise.

Legend: N samples, G noise levels, J horizons, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soar_mega.evaluation.exposure_bias import Measurement, Moments
from soar_mega.evaluation.handwriting.frechet import gaussian_distance

_GROUPS = 20  # At most so many groups of samples are left out in turn for an error.

Curve = dict[str, list[float | None]]


def report(measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    """Everything about some models, and the others' differences from the first.

    Returns:
        ``samples``, ``steps``, ``guidance_scale``, ``horizons``, ``sigmas``; ``models``, by label:
        curves ``ideal_error``, ``state_norm``, ``clean_norm``, ``ideal_clean_norm``,
        ``law_distance``, and by horizon ``drift``, ``own_error``, ``gap``, ``response``,
        ``unprompted_response``; ``differences``, by label: those of ``drift``, ``own_error``,
        ``gap``. ``overall`` of a model or difference has the mean over the noise levels of each of
        these three by horizon.

    Raises:
        ValueError: No model, or not all were measured alike.
    """
    if not measurements:
        raise ValueError("no model was measured")
    first, *others = measurements
    one = measurements[first]
    for label in others:
        other = measurements[label]
        for name in ("sigmas", "horizons", "guidance_scale"):
            if getattr(one, name) != getattr(other, name):
                raise ValueError(f"{first} and {label} were measured with other {name}")
        if one.drift_JGN.shape != other.drift_JGN.shape:
            raise ValueError(f"{first} and {label} were measured with other numbers of samples")
    return {
        "samples": one.drift_JGN.shape[-1],
        "steps": len(one.sigmas) - 1,
        "guidance_scale": one.guidance_scale,
        "horizons": list(one.horizons),
        "sigmas": list(one.sigmas),
        "models": {label: _summary(m) for label, m in measurements.items()},
        "differences": {label: _difference(one, measurements[label]) for label in others},
    }


def table(found: Mapping[str, Any]) -> str:
    """The longest horizon's numbers and the end of the whole way, a line a model."""
    horizon = str(found["horizons"][-1])
    width = max(len(label) for label in found["models"])
    heads = (f"drift, {horizon} steps", f"gap, {horizon} steps", "end: norm", "end: law distance")
    lines = [" " * width + "".join(f"  {head:>18}" for head in heads)]
    for label, model in found["models"].items():
        numbers = [model["overall"][name][horizon] for name in ("drift", "gap")]
        curves = [model[name] for name in ("state_norm", "law_distance")]
        numbers += [{key: curve[key][-1] for key in ("mean", "error")} for curve in curves]
        cells = (f"  {n['mean']:>8.4f} +- {n['error']:.4f}" for n in numbers)
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _summary(m: Measurement) -> dict[str, Any]:
    real_GN = m.ideal_clean_square_GN[-1:].expand_as(m.clean_square_GN)
    return {
        "ideal_error": _curve(m.ideal_error_GN),
        **_by_horizon(m, _excursions(m)),
        "response": _responses(m, m.change_JGN),
        "unprompted_response": _responses(m, m.unprompted_change_JGN),
        "state_norm": _norm(m.states.square_GN, m.ideal_states.square_GN),
        "clean_norm": _norm(m.clean_square_GN, real_GN),
        "ideal_clean_norm": _norm(m.ideal_clean_square_GN, real_GN),
        "law_distance": _law_distance(m.states, m.ideal_states),
    }


def _difference(one: Measurement, other: Measurement) -> dict[str, Any]:
    before, after = _excursions(one), _excursions(other)
    return _by_horizon(one, {name: after[name] - before[name] for name in before})


def _excursions(m: Measurement) -> dict[str, Tensor]:
    sigma_G1 = torch.tensor(m.sigmas, dtype=torch.float64)[:, None]
    return {
        "drift": m.drift_JGN,
        "own_error": m.own_error_JGN,
        # Times sigma, the error of the clean estimate z - sigma v: the velocity that leads back
        # has no bound as sigma falls.
        "gap": sigma_G1 * (m.own_error_JGN - m.ideal_error_GN),
    }


def _by_horizon(m: Measurement, values: Mapping[str, Tensor]) -> dict[str, Any]:
    result: dict[str, Any] = {"overall": {}}
    for name, values_JGN in values.items():
        pairs = list(zip(map(str, m.horizons), values_JGN, strict=True))
        result[name] = {j: _curve(values_GN) for j, values_GN in pairs}
        overall = ((j, _curve(values_GN.nanmean(dim=0, keepdim=True))) for j, values_GN in pairs)
        result["overall"][name] = {
            j: {key: numbers[0] for key, numbers in curve.items()} for j, curve in overall
        }
    return result


def _curve(values_GN: Tensor) -> Curve:
    error_G = values_GN.std(dim=1) / math.sqrt(values_GN.shape[1])
    return {"mean": _plain(values_GN.mean(dim=1)), "error": _plain(error_G)}


def _plain(values_G: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values_G.tolist()]


def _responses(m: Measurement, change_JGN: Tensor) -> dict[str, Curve]:
    """By horizon, how much of the way off shows in the clean estimate."""
    rows = zip(map(str, m.horizons), change_JGN, m.drift_JGN.square(), strict=True)
    curves = ((j, _ratio(change_GN, square_GN)) for j, change_GN, square_GN in rows)
    return {j: {"mean": _plain(mean), "error": _plain(error)} for j, (mean, error) in curves}


def _norm(squares_GN: Tensor, truth_GN: Tensor) -> Curve:
    """Root of the ratio of two mean squares."""
    ratio_G, error_G = _ratio(squares_GN, truth_GN)
    return {"mean": _plain(ratio_G.sqrt()), "error": _plain(error_G / (2 * ratio_G.sqrt()))}


def _ratio(values_GN: Tensor, truth_GN: Tensor) -> tuple[Tensor, Tensor]:
    """The ratio of two means and its standard error to first order, the two being paired."""
    mean_G, truth_G = values_GN.mean(dim=1), truth_GN.mean(dim=1)
    ratio_G = mean_G / truth_G
    rest_GN = values_GN - ratio_G[:, None] * truth_GN
    return ratio_G, rest_GN.std(dim=1) / math.sqrt(rest_GN.shape[1]) / truth_G


def _law_distance(states: Moments, truth: Moments) -> Curve:
    """Root of the Frechet distance of the channels' Gaussians over C; its error by jackknife."""
    count = states.first_GNC.shape[1]
    groups = torch.arange(count).chunk(min(count, _GROUPS))
    curve: Curve = {"mean": [], "error": []}
    for g in range(len(states.first_GNC)):
        curve["mean"].append(_distance(states, truth, g, torch.arange(count)))
        left_out = []
        for group in groups:
            kept = torch.ones(count, dtype=torch.bool)
            kept[group] = False
            left_out.append(_distance(states, truth, g, kept.nonzero()[:, 0]))
        spread = float(np.var(left_out)) * (len(groups) - 1)
        curve["error"].append(math.sqrt(spread))
    return curve


def _distance(states: Moments, truth: Moments, g: int, samples: Tensor) -> float:
    sides = []
    for moments in (states, truth):
        mean_C = moments.first_GNC[g, samples].mean(dim=0)
        second_CC = moments.second_GNCC[g, samples].mean(dim=0)
        sides += [mean_C.numpy(), (second_CC - mean_C[:, None] * mean_C).numpy()]
    return math.sqrt(max(gaussian_distance(*sides), 0.0) / len(sides[0]))
