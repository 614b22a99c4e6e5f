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

    With ablations ``ablations.png`` too: SOAR's and theirs against the controls at equal steps.

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
    names = {arm.name for arm in ABLATIONS}
    ablations = [arm for arm in arms if arm.name in names]
    opponents = [arm for arm in others if arm.name not in names]
    controls = [arm for arm in opponents if arm.steps == soar.steps]
    parts = [
        summary.headline(results, soar, others),
        summary.by_sampling(results, arms),
        summary.by_kind(results, arms),
        summary.differences(results, soar, others),
    ]
    if ablations:
        parts.append(summary.against(results, ablations, controls))
    text = "\n\n".join(parts)
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
    compared = [arm for arm in arms if arm.name not in names]
    plots.plot_scores(results, compared, out / "scores.png")
    rows = [(f"{soar.title} minus {other.title}", [(soar, other)]) for other in opponents]
    plots.plot_differences(results, rows, out / "differences.png")
    if ablations:
        rows = [(arm.title, [(arm, other) for other in controls]) for arm in (soar, *ablations)]
        plots.plot_differences(results, rows, out / "ablations.png")
    return text
