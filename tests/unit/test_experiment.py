"""The experiment's arithmetic, tables and plots, on made-up results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from soar_mega.config import load_config
from soar_mega.data.tiny.pages import KINDS
from soar_mega.evaluation.experiment.arms import (
    ABLATIONS,
    IDEAL,
    MAIN,
    PRIMARY,
    SAMPLINGS,
    SOAR,
    Arm,
)
from soar_mega.evaluation.experiment.arms import SFT as SFT_ARM
from soar_mega.evaluation.experiment.report import write_report
from soar_mega.evaluation.experiment.statistics import estimate, paired_difference
from soar_mega.evaluation.experiment.summary import BASE, Results
from soar_mega.telemetry.flops import training_factor

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2, 3)


def test_intervals_are_students() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    # t with 4 degrees of freedom: 2.7764; standard error sqrt(2.5 / 5).
    assert found.mean == 3
    assert found.high - 3 == pytest.approx(2.7764451 * math.sqrt(0.5), rel=1e-6)
    assert 3 - found.low == pytest.approx(found.high - 3)
    assert found.excludes_zero and not estimate([-1.0, 1.0, 0.5]).excludes_zero
    alone = estimate([2.0])
    assert alone.mean == 2 and math.isnan(alone.low) and not alone.excludes_zero
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_pairs_remove_what_seeds_share() -> None:
    seeds = [0.1, 0.5, 0.9]
    found = paired_difference([s + 0.05 for s in seeds], seeds)
    assert found.mean == pytest.approx(0.05) and found.excludes_zero
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("arm", [*MAIN, *ABLATIONS], ids=lambda arm: arm.name)
def test_every_arm_is_a_configuration_that_costs_what_it_says(arm: Any) -> None:
    config = load_config(ROOT / "configs" / arm.config, list(arm.overrides))
    assert training_factor(config.objective) == arm.forwards
    if arm.config == SOAR.config and arm not in ABLATIONS:
        assert config.objective.num_sampling_steps == SAMPLINGS[0].steps
        assert config.objective.cfg_scale_sampling == SAMPLINGS[0].guidance


def test_arms_have_names_of_their_own_and_equal_compute_is_equal() -> None:
    names = [arm.name for arm in (*MAIN, *ABLATIONS)]
    assert len(set(names)) == len(names)
    compute = {arm.name: arm.steps * arm.forwards for arm in MAIN}
    assert compute["sft_compute"] == pytest.approx(compute["soar"], rel=0.01)
    longer = {arm.name: arm.longer(4).steps for arm in MAIN}
    assert longer == {arm.name: 4 * arm.steps for arm in MAIN}


def made_up(arms: Sequence[Arm] = MAIN) -> dict[str, Any]:
    """SOAR 0.1 above everything, whatever the seed and the way to draw."""

    def part(value: float) -> dict[str, Any]:
        whole = {"value": value}
        return {"overall": whole, "categories": {kind: whole for kind in KINDS}}

    models: dict[str, float] = {BASE: 0.2}
    for arm in arms:
        for seed in SEEDS:
            models[f"{arm.name}-{seed}"] = 0.3 + 0.01 * seed + 0.1 * (arm is SOAR)
    scorers = {
        "handwriting": {"models": {m: {"correct": part(v)} for m, v in models.items()}},
        "handwriting_frechet": {
            "models": {
                m: {"pixels": part(1 - v), "reader": {"overall": {"value": None}}}
                for m, v in models.items()
            }
        },
    }
    return {sampling.name: {"scorers": deepcopy(scorers)} for sampling in SAMPLINGS}


def test_differences_are_paired_by_seed() -> None:
    results = Results(made_up(), SEEDS)
    assert results.difference(SOAR, SFT_ARM).mean == pytest.approx(0.1)
    assert results.difference(SOAR, IDEAL, metric="handwriting_frechet/pixels").high < 0
    assert results.values(PRIMARY[0], SFT_ARM, PRIMARY[1], "count") == pytest.approx(
        [0.31, 0.32, 0.33]
    )


def test_the_report_holds_tables_numbers_and_plots(tmp_path: Path) -> None:
    alone = write_report(tmp_path, made_up(), MAIN, SEEDS[:1])
    assert "SOAR minus SFT: 0.100: one seed has no interval" in alone and "nan]" not in alone
    text = write_report(tmp_path, made_up(), MAIN, SEEDS)
    assert "SOAR minus SFT: 0.100 [0.100, 0.100]: the 95 % interval excludes 0" in text
    assert "SFT, SOAR's compute, equal compute: 0.100" in text
    assert "| base | 0.200 | 0.200 | 0.200 | 0.200 |" in text
    assert (tmp_path / "tables.md").read_text().strip() == text
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["by_seed"]["soar"]["guided"]["handwriting/correct"][0] == pytest.approx(0.41)
    for name in ("scores.png", "differences.png"):
        assert Image.open(tmp_path / name).size[0] > 500
    assert not (tmp_path / "ablations.png").exists()


def test_an_ablation_is_drawn_in_its_own_ways_only(tmp_path: Path) -> None:
    arms = [*MAIN, *ABLATIONS]
    found = made_up(arms)
    for sampling in SAMPLINGS:
        for scorer in found[sampling.name]["scorers"].values():
            for arm in arms:
                if sampling.name not in arm.drawn:
                    for seed in SEEDS:
                        del scorer["models"][f"{arm.name}-{seed}"]
    assert all(PRIMARY[0] in arm.drawn for arm in arms)
    text = write_report(tmp_path, found, arms, SEEDS)
    drawn = "0.320 [0.295, 0.345]"
    assert f"| lambda 3 | {drawn} |  |  |  |" in text
    assert f"| K = 30 | {drawn} |  |  | {drawn} |" in text
    assert (
        "| K = 30 | correct | **0.100 [0.100, 0.100]** |  |  | **0.100 [0.100, 0.100]** |" in text
    )
    none = "0.000 [0.000, 0.000]"
    assert f"| rollout unguided | unguided | correct | {none} | {none} | {none} |" in text
    assert "rollout unguided | few steps" not in text
    assert Image.open(tmp_path / "ablations.png").size[0] > 500
    content = json.loads((tmp_path / "summary.json").read_text())
    assert list(content["by_seed"]["guidance_1"]) == ["guided", "unguided"]
