"""Exposure bias of velocity fields whose drift is known on paper, and its report and picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.evaluation.exposure_bias import Measurement, measure
from soar_mega.evaluation.exposure_report import report, table
from soar_mega.passes import ModelInput, TextCondition
from soar_mega.sampling.generate import generate, one_by_one, sampler_sigmas, start_noise

N, SHAPE, STEPS = 5, (4, 3, 2), 6
CONSTANT = 0.7
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}

Field = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@pytest.fixture
def scheduler(tmp_path: Path) -> Path:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return tmp_path


def samples(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, *SHAPE, generator=generator, dtype=dtype) * 0.8 + 0.1


def conditions() -> tuple[TextCondition, TextCondition]:
    """The pooled embedding is the sample's number, and -1 where there is no prompt."""
    text = torch.zeros(N, 1, 1)
    empty = TextCondition(text[:1], torch.full((1, 1), -1.0))
    return TextCondition(text, torch.arange(N, dtype=torch.float32)[:, None]), empty


def run(field: Field, scheduler: Path, **settings: Any) -> Measurement:
    """``field``: velocity of state, sigma (B, 1, 1, 1), sample numbers, and whether prompted."""

    def model(x: ModelInput) -> Tensor:
        number_B = x.condition.pooled_BV[:, 0].long()
        sigma = x.timestep_B[:, None, None, None] / 1000
        return field(x.latent_BCHW, sigma, number_B, bool((number_B >= 0).all()))

    given = {"clean_NCHW": samples(), "num_inference_steps": STEPS, "horizons": (1, 2, 4)}
    return measure(one_by_one(model), *conditions(), scheduler, **(given | settings))


def straight(z: Tensor, sigma: Tensor, number_B: Tensor, prompted: bool) -> Tensor:
    """The exact velocity of each sample's own path; only the prompt tells which."""
    clean_NCHW = samples()
    ends = start_noise(range(N), SHAPE).double() - clean_NCHW
    return ends[number_B]


def bent(z: Tensor, sigma: Tensor, number_B: Tensor, prompted: bool) -> Tensor:
    """A nonlinear field for which nothing is special."""
    return torch.sin(1.3 * z + sigma) + (0.1 * number_B[:, None, None, None] if prompted else 0.0)


def test_an_exact_field_has_no_exposure_bias(scheduler: Path) -> None:
    found = run(straight, scheduler, guidance_scale=1.0)
    for values in (found.drift_JGN, found.own_error_JGN, found.ideal_error_GN):
        assert values.nan_to_num().abs().max() < 1e-9
    model = report({"exact": found})["models"]["exact"]
    assert model["state_norm"]["mean"] == pytest.approx([1.0] * (STEPS + 1), abs=1e-9)
    assert max(model["law_distance"]["mean"]) < 1e-6
    assert model["clean_norm"]["mean"] == pytest.approx([1.0] * (STEPS + 1), abs=1e-9)
    assert model["ideal_clean_norm"]["mean"] == pytest.approx([1.0] * (STEPS + 1), abs=1e-9)


def test_where_there_is_nothing_to_measure(scheduler: Path) -> None:
    found = run(straight, scheduler, guidance_scale=1.0)
    assert found.horizons == (1, 2, 4)
    for row, j in enumerate(found.horizons):
        there_G = ~found.drift_JGN[row].isnan().any(dim=1)
        assert there_G.tolist() == [g >= j for g in range(STEPS + 1)]
        there_G = ~found.own_error_JGN[row].isnan().any(dim=1)
        assert there_G.tolist() == [j <= g < STEPS for g in range(STEPS + 1)]
    assert found.ideal_error_GN.isnan().any(dim=1).tolist() == [False] * STEPS + [True]
    assert run(bent, scheduler, horizons=(1, STEPS + 1)).horizons == (1,)


def test_a_constant_error_drifts_as_on_paper(scheduler: Path) -> None:
    """v = z1 - z0 + c: the drift is |c| (sigma_i - sigma_j), the error |c| sigma_i / sigma_j."""

    def off(z: Tensor, sigma: Tensor, number_B: Tensor, prompted: bool) -> Tensor:
        return straight(z, sigma, number_B, prompted) + CONSTANT

    found = run(off, scheduler, guidance_scale=1.0)
    sigmas = sampler_sigmas(scheduler, STEPS)
    curves = report({"off": found})["models"]["off"]
    for row, j in enumerate(found.horizons):
        for g in range(j, STEPS + 1):
            drift = CONSTANT * (sigmas[g - j] - sigmas[g])
            assert (found.drift_JGN[row, g] - drift).abs().max() < 1e-9
            assert curves["drift"][str(j)]["mean"][g] == pytest.approx(drift, abs=1e-9)
            assert curves["drift"][str(j)]["error"][g] == pytest.approx(0, abs=1e-9)
            if g < STEPS:
                error = CONSTANT * sigmas[g - j] / sigmas[g]
                assert (found.own_error_JGN[row, g] - error).abs().max() < 1e-9
                assert curves["gap"][str(j)]["mean"][g] == pytest.approx(drift, abs=1e-9)
    assert curves["overall"]["drift"]["4"]["mean"] == pytest.approx(
        sum(CONSTANT * (sigmas[g - 4] - sigmas[g]) for g in range(4, STEPS + 1)) / (STEPS - 3)
    )
    # From noise, all channels move alike: what is left of the law's distance is the mean.
    assert curves["law_distance"]["mean"] == pytest.approx(
        [CONSTANT * (1 - sigma) for sigma in sigmas], abs=1e-6
    )


def test_guidance_moves_states_but_not_the_velocity_that_is_judged(scheduler: Path) -> None:
    """Unprompted the field is 0: with scale g the excursion moves g times as far."""

    def halves(z: Tensor, sigma: Tensor, number_B: Tensor, prompted: bool) -> Tensor:
        return straight(z, sigma, number_B, True) if prompted else torch.zeros_like(z)

    found = run(halves, scheduler, guidance_scale=3.0)
    assert found.ideal_error_GN[:-1].max() < 1e-9
    sigmas = sampler_sigmas(scheduler, STEPS)
    length_N = (start_noise(range(N), SHAPE).double() - samples()).square().mean((1, 2, 3)).sqrt()
    expected_N = 2 * (sigmas[0] - sigmas[2]) * length_N
    torch.testing.assert_close(found.drift_JGN[1, 2], expected_N, rtol=0, atol=1e-9)
    error_N = 2 * (sigmas[0] - sigmas[2]) / sigmas[2] * length_N
    torch.testing.assert_close(found.own_error_JGN[1, 2], error_N, rtol=0, atol=1e-8)


def test_the_response_is_how_much_of_the_way_off_shows_in_the_estimate(scheduler: Path) -> None:
    """Estimates that take over a third of it prompted and half of it unprompted."""

    def takes_over(z: Tensor, sigma: Tensor, number_B: Tensor, prompted: bool) -> Tensor:
        rows = torch.arange(N)
        clean, noise = samples()[rows], start_noise(range(N), SHAPE).double()[rows]
        off = z - (1 - sigma) * clean - sigma * noise
        share, wrong = (1 / 3, 0.2) if prompted else (1 / 2, 0.0)
        return (z - (clean + wrong + share * off)) / sigma

    model = report({"one": run(takes_over, scheduler, guidance_scale=2.0)})["models"]["one"]
    for j in (1, 2, 4):
        told = model["response"][str(j)]["mean"]
        assert told == pytest.approx([*[None] * j, *[1 / 3] * (STEPS - j), None])
        assert max(model["response"][str(j)]["error"][j:-1]) < 1e-9
        told = model["unprompted_response"][str(j)]["mean"]
        there = [1 / 2] * (STEPS - j) if j < 4 else [None] * (STEPS - j)
        assert told == pytest.approx([*[None] * j, *there, None])
    model = report({"one": run(takes_over, scheduler, guidance_scale=1.0)})["models"]["one"]
    assert model["response"]["2"]["mean"][2:-1] == pytest.approx([1 / 3] * (STEPS - 2))
    assert set(model["unprompted_response"]["2"]["mean"]) == {None}


def test_a_field_that_leads_back_has_no_gap_however_far_it_drifts(scheduler: Path) -> None:
    """What SOAR trains for: from every state the velocity to its own sample."""

    def back(z: Tensor, sigma: Tensor, number_B: Tensor, prompted: bool) -> Tensor:
        return (z - samples()[number_B]) / sigma if prompted else torch.zeros_like(z)

    found = run(back, scheduler, guidance_scale=1.5)
    for row, j in enumerate(found.horizons):
        assert found.drift_JGN[row, j:].min() > 1e-3
        assert found.own_error_JGN[row, j:-1].max() < 1e-9
    assert found.ideal_error_GN[:-1].max() < 1e-9
    assert report({"back": found})["models"]["back"]["gap"]["2"]["mean"][2] < 1e-9


def test_the_whole_way_is_the_samplers(scheduler: Path) -> None:
    """Its end has the moments of what ``generate`` makes from the same noise."""

    def model(x: ModelInput) -> Tensor:
        number_B = x.condition.pooled_BV[:, 0].long()
        sigma = x.timestep_B[:, None, None, None] / 1000
        return bent(x.latent_BCHW, sigma, number_B, bool((number_B >= 0).all()))

    found = run(bent, scheduler, clean_NCHW=samples(torch.float32), guidance_scale=2.5)
    end_NCHW = generate(
        one_by_one(model),
        *conditions(),
        scheduler,
        latents_BCHW=start_noise(range(N), SHAPE),
        num_inference_steps=STEPS,
        guidance_scale=2.5,
    )
    mean_NC = end_NCHW.double().mean(dim=(2, 3))
    torch.testing.assert_close(found.states.first_GNC[-1], mean_NC, rtol=1e-5, atol=1e-6)
    square_N = end_NCHW.double().square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.states.square_GN[-1], square_N, rtol=1e-5, atol=1e-6)


def test_batches_change_nothing(scheduler: Path) -> None:
    whole, parts = (run(bent, scheduler, batch_size=size) for size in (None, 2))
    for name in ("drift_JGN", "own_error_JGN", "ideal_error_GN", "clean_square_GN"):
        one, other = getattr(whole, name), getattr(parts, name)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)
    one, other = whole.states.second_GNCC, parts.states.second_GNCC
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_report_is_plain_deterministic_and_paired(scheduler: Path) -> None:
    def worse(z: Tensor, sigma: Tensor, number_B: Tensor, prompted: bool) -> Tensor:
        return bent(z, sigma, number_B, prompted) + 0.05

    first, second = (
        report({"a": run(bent, scheduler), "b": run(worse, scheduler)}) for _ in range(2)
    )
    text = json.dumps(first, allow_nan=False)
    assert text == json.dumps(second)
    assert json.loads(text) == first
    assert (first["samples"], first["steps"], first["horizons"]) == (N, STEPS, [1, 2, 4])
    assert list(first["differences"]) == ["b"]
    difference, models = first["differences"]["b"]["drift"]["2"], first["models"]
    before, after = (models[label]["drift"]["2"]["mean"][-1] for label in "ab")
    assert difference["mean"][-1] == pytest.approx(after - before)
    assert difference["error"][-1] < models["a"]["drift"]["2"]["error"][-1]
    lines = table(first).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["a", "b"]


def test_the_error_of_the_laws_distance_is_that_of_repeated_draws() -> None:
    from soar_mega.evaluation.exposure_bias import Moments
    from soar_mega.evaluation.exposure_report import _law_distance

    generator = torch.Generator().manual_seed(1)
    means, errors = [], []
    for _ in range(40):
        sides = [Moments.empty(1, 60, 2) for _ in range(2)]
        for side, shift in zip(sides, (0.5, 0.0), strict=True):
            drawn = torch.randn(60, 2, 3, 3, generator=generator) + shift
            # A sample's places are not independent.
            side.put(0, slice(None), drawn + torch.randn(60, 2, 1, 1, generator=generator) / 2)
        curve = _law_distance(*sides)
        means.append(curve["mean"][0])
        errors.append(curve["error"][0])
    spread = torch.tensor(means).std().item()
    assert 0.7 < torch.tensor(errors).mean().item() / spread < 1.4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clean_NCHW": samples()[:1]}, "at least two samples"),
        ({"clean_NCHW": samples()[:3]}, "one prompt each"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"horizons": (2, 1)}, "must rise"),
        ({"horizons": ()}, "must rise"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str, scheduler: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run(bent, scheduler, **settings)


def test_a_sampler_with_noise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(SCHEDULER | {"stochastic_sampling": True}))
    with pytest.raises(ValueError, match="stochastic_sampling"):
        sampler_sigmas(tmp_path, 4)


def test_models_that_were_measured_otherwise_do_not_compare(scheduler: Path) -> None:
    one, other = run(bent, scheduler), run(bent, scheduler, guidance_scale=2.0)
    with pytest.raises(ValueError, match="other guidance_scale"):
        report({"one": one, "other": other})
    with pytest.raises(ValueError, match="no model"):
        report({})


def test_the_picture(scheduler: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from soar_mega.evaluation.exposure_plot import plot

    found = report({"a": run(bent, scheduler), "b": run(straight, scheduler)})
    # What was written is enough, and the same bytes come again.
    plot(json.loads(json.dumps(found)), tmp_path / "one.png")
    plot(found, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = Image.open(tmp_path / "one.png").convert("RGB")
    assert picture.width > 1000
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    assert {(0x25, 0x63, 0xB0), (0xD9, 0x55, 0x2B)} <= colours
    with pytest.raises(ValueError, match="at most 6"):
        plot(found | {"models": dict.fromkeys("abcdefg", found["models"]["a"])}, tmp_path / "x.png")
