"""Measure a SOAR step's memory and speed against a plain loop on diffusers' own model."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from soar_mega.training.benchmark import Case, compare


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Every measurement is a fresh process on the CPU; the sides alternate and medians "
        "are compared.\nexample: python tools/benchmark.py --repeats 5 --out result.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in fields(Case):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=int, default=field.default, help="of the measured case")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    arguments = vars(parser.parse_args())
    repeats, steps, out = (arguments.pop(key) for key in ("repeats", "steps", "out"))
    record = compare(Case(**arguments), repeats, steps, print)
    record["command"] = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    print(f"peak memory growth: {record['memory_ratio']:.2f} of the plain loop's")
    print(f"speed: {record['speedup']:.2f} times the plain loop's")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
