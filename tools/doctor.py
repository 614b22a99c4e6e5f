#!/usr/bin/env python
"""Looks at a run folder and says what is wrong with it and how to mend it; changes nothing.

Checkpoints (every file is read and its hash compared), what lies beside them, where the weights
come from, which steps a restart does again, skipped steps, room on the disk, the base model, and
what checkpoint.resume=latest would choose. Exit code 1 if there is a PROBLEM, else 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from soar_mega.training.run_doctor import examine, sick

_EPILOG = """\
examples:
  python tools/doctor.py runs/sd35_medium_soar
  python tools/doctor.py runs/sd35_medium_soar --quick
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run.dir of a run")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compare sizes of checkpoint files only; a flipped bit goes unnoticed",
    )
    given = parser.parse_args(arguments)
    findings = []
    for finding in examine(given.run_dir, quick=given.quick):
        print(finding, flush=True)
        findings.append(finding)
    return 1 if sick(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
