#!/usr/bin/env python
"""Is SOAR better than SFT? Trains, draws and reads the comparison of docs/soar_vs_sft.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from soar_mega.evaluation.experiment.arms import ABLATIONS, EXPOSED, MAIN, SAMPLINGS, SEEDS, STEPS
from soar_mega.evaluation.experiment.report import write_report
from soar_mega.evaluation.experiment.run import Experiment, ExperimentError

_EPILOG = """\
DIR gets settings.json, data/ and encoded/ (pages), runs/ARM-SEED, pictures/ (drawn and scored by
tools/evaluate.py, one folder a way to draw), exposure/ (exposure bias of SFT, SOAR and seven draws,
seed 1), logs/, tables.md, summary.json, scores.png, differences.png and, with ablations,
ablations.png. The same command goes on where it was stopped; ablations and more seeds may be added
to what is there.

examples:
  tools/experiment.py
  tools/experiment.py --ablations
  tools/experiment.py --ablations guidance_1 --seeds 13
  tools/experiment.py --steps 400 --seeds 1 --out runs/longer
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), metavar="DIR")
    parser.add_argument(
        "--ablations",
        nargs="*",
        choices=[arm.name for arm in ABLATIONS],
        metavar="NAME",
        help="these too, without a name all of them: %(choices)s",
    )
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help="runs of every arm (default: 5)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        metavar="N",
        help=f"of every arm at equal steps (default: {STEPS}); equal compute lasts accordingly",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="processes at a time (default: 2)"
    )
    parser.add_argument(
        "--pictures", type=int, default=512, metavar="N", help="prompts to draw (default: 512)"
    )
    parser.add_argument(
        "--pages",
        type=int,
        default=4096,
        metavar="N",
        help="curated pages to train on (default: 4096)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="a setting of every training run, for a shorter trial; may be given again",
    )
    arguments = parser.parse_args()
    wanted = arguments.ablations
    ablations = [] if wanted is None else [a for a in ABLATIONS if not wanted or a.name in wanted]
    arms = [arm.longer(arguments.steps / STEPS) for arm in (*MAIN, *ablations)]
    experiment = Experiment(
        Path(__file__).resolve().parents[1],
        arguments.out,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        pictures=arguments.pictures,
        pages=arguments.pages,
        overrides=arguments.set,
    )
    try:
        found = experiment.run(arms)
        experiment.measure_exposure(EXPOSED, SAMPLINGS[0])
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(write_report(arguments.out, found, arms, experiment.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
