"""Writes what an experiment found: tables, plots, and the numbers behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soar_mega.evaluation.experiment import plots, summary
from soar_mega.evaluation.experiment.arms import ABLATIONS, PRIMARY, SOAR, Arm


def write_report(
    out: Path, found: Mapping[str, Any], arms: Sequence[Arm], seeds: Sequence[int]
) -> str:
    """``tables.md``, ``summary.json``, ``scores.png`` and ``differences.png`` in ``out``.

    Args:
        out: Folder to write into.
        found: By sampling's name, the content of its ``results.json``.
        arms: SOAR among them.
        seeds: Of every arm.

    Returns:
        The tables.
    """
    results = summary.Results(found, seeds)
    (soar,) = (arm for arm in arms if arm.name == SOAR.name)
    others = [arm for arm in arms if arm is not soar]
    ablations = {arm.name for arm in ABLATIONS}
    text = "\n\n".join(
        [
            summary.headline(results, soar, others),
            summary.by_sampling(results, arms),
            summary.by_kind(results, arms),
            summary.differences(results, soar, others),
        ]
    )
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    content = {
        "primary": PRIMARY,
        "seeds": list(seeds),
        "steps": {arm.name: arm.steps for arm in arms},
        "forwards_per_sample": {arm.name: arm.forwards for arm in arms},
        "base": {
            s.name: {m: results.value(s.name, summary.BASE, m) for m in summary.METRICS}
            for s in results.samplings
        },
        "by_seed": {
            arm.name: {
                s.name: {m: results.values(s.name, arm, m) for m in summary.METRICS}
                for s in results.samplings
                if s.name in arm.drawn
            }
            for arm in arms
        },
    }
    (out / "summary.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    # An ablation shows in its difference; sixteen bars a group show nothing.
    compared = [arm for arm in arms if arm.name not in ablations]
    plots.plot_scores(results, compared, out / "scores.png")
    plots.plot_differences(results, soar, others, out / "differences.png")
    return text
