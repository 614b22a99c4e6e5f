#!/usr/bin/env python
"""Counts, verifies and shows the samples of WebDataset shards."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from soar_mega.data.errors import DataError
from soar_mega.data.inspect.report import as_json, table
from soar_mega.data.inspect.run import inspect, open_shards
from soar_mega.data.inspect.sheet import choose_samples, contact_sheet

_EPILOG = """\
Exit code 1: a shard cannot be used, or --verify found something bad.

examples:
  tools/inspect_data.py 'shards/*.tar'
  tools/inspect_data.py 'shards/train-{000000..000015}.tar' --verify --workers 8
  tools/inspect_data.py 'shards/*.tar' --sheet look.png --samples 24
  tools/inspect_data.py 'downloaded/*.tar' --write-index
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="paths, globs or braces, as in data.shards"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything: tars and pictures against the index, and decode every picture",
    )
    parser.add_argument(
        "--write-index",
        action="store_true",
        help="write SHARD.index.json beside shards that have none",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="OUT.png", help="draw a contact sheet with captions"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=20,
        metavar="N",
        help="on the sheet, drawn at random (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: %(default)s)")
    parser.add_argument(
        "--keys", nargs="+", default=[], metavar="KEY", help="show these samples instead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per CPU)",
    )
    given = parser.parse_args(arguments)
    try:
        opened = open_shards(given.shards, setting="SHARDS")
        if given.sheet:
            chosen = choose_samples(opened.index, given.samples, seed=given.seed, keys=given.keys)
            contact_sheet(opened.index, chosen, given.sheet)
        summary = inspect(
            opened,
            verify=given.verify,
            write_missing=given.write_index,
            workers=given.workers,
            progress=sys.stderr.isatty(),
        )
    except (DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_json(summary), indent=2) if given.json else table(summary))
    return int(bool(opened.unusable or (given.verify and summary.bad)))


if __name__ == "__main__":
    sys.exit(main())
