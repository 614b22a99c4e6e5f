#!/usr/bin/env python
"""Pretrain a tiny SD3.5 on real handwriting, continue with SOAR, open the result in diffusers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from soar_mega.evaluation.demo import Demo, DemoError

_EPILOG = """\
DIR gets: tiny/ (data and the untrained pipeline), pretrain/ and soar/ (the two runs), before/ and
export/ (diffusers folders), before_after.png, pictures/, report.json.

examples:
  python tools/demo.py --out runs/demo
  python tools/demo.py --out runs/short --set pretrain.train.max_train_steps=20 \\
      --set soar.train.max_train_steps=2
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    parser.add_argument("--processes", type=int, default=2, help="tensor parallel (default: 2)")
    parser.add_argument("--pictures", type=int, default=128, help="prompts to score (default: 128)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PHASE.SECTION.KEY=VALUE",
        help="a setting of the phase pretrain or soar; may be given again",
    )
    arguments = parser.parse_args()
    demo = Demo(
        Path(__file__).resolve().parents[1],
        arguments.out,
        processes=arguments.processes,
        overrides=arguments.set,
        pictures=arguments.pictures,
    )
    try:
        demo.run()
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(demo.farewell())
    return 0


if __name__ == "__main__":
    sys.exit(main())
