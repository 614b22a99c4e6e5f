#!/usr/bin/env python
"""Writes what to install beside the torch and the NVIDIA packages that an image brings.

OUT/requirements.txt: pyproject.toml's dependencies without torch, Transformer Engine, apex, DALI
and the like. OUT/constraints.txt: these pinned as they are installed, so that pip cannot touch
them, and from constraints.txt the versions of what is not there yet. With --check: whether what the
image brought still is as it was; exit code 1 if not. The Dockerfile uses it; it works in any
environment that has a torch of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from soar_mega.install.requirements import constraints, installed_versions, moved, needed

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/image_requirements.py --out /tmp/install --extras wandb && "
        "python -m pip install -c /tmp/install/constraints.txt -r /tmp/install/requirements.txt && "
        "python tools/image_requirements.py --out /tmp/install --check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--extras", nargs="*", default=[], help="of pyproject.toml (default: none)")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args(arguments)
    if args.check:
        wrong = moved((args.out / "constraints.txt").read_text().splitlines(), installed_versions())
        for line in wrong:
            print(f"error: {line}: the image's own must stay as it was", file=sys.stderr)
        return 1 if wrong else 0
    try:
        requirements = needed(ROOT / "pyproject.toml", args.extras)
    except ValueError as error:
        parser.error(str(error))
    pins = constraints(ROOT / "constraints.txt", installed_versions())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "requirements.txt").write_text("\n".join(requirements) + "\n")
    (args.out / "constraints.txt").write_text("\n".join(pins) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
