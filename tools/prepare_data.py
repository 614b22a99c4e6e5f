#!/usr/bin/env python
"""Makes balanced WebDataset shards, with an index beside each, of pictures with captions."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from soar_mega.data.errors import DataError
from soar_mega.data.prepare.run import prepare

_EPILOG = """\
INPUT is one of
  a folder    pictures with captions beside them, at any depth: x.jpg and x.txt or x.json
  a .jsonl    objects with image and caption, or HY-SOAR's with md5 and caption_en
  a .csv      with the columns image and caption
  a .parquet  with the same columns as either (needs pyarrow: pip install 'soar-mega[parquet]')
  a .tar      KEY.jpg with KEY.txt or KEY.json (as img2dataset writes them), or a pattern of tars
or several of them. Pictures are carried byte for byte. What cannot be used is listed with its
reason in OUT/refused.jsonl. A run that was stopped goes on when the same command is given again.

examples:
  tools/prepare_data.py photos --out shards --samples-per-shard 1000 --workers 8
  tools/prepare_data.py list.jsonl --root photos --out shards
  tools/prepare_data.py 'downloaded/*.tar' --out shards --workers 8
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="see below")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--root", metavar="DIR", help="what paths in tables are relative to (default: the table)"
    )
    parser.add_argument(
        "--prefix", default="train", help="shards are PREFIX-000000.tar ... (default: %(default)s)"
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="at most; shards differ by one sample at most (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per CPU)",
    )
    given = parser.parse_args(arguments)
    try:
        report = prepare(
            given.inputs,
            given.out,
            root=given.root,
            prefix=given.prefix,
            samples_per_shard=given.samples_per_shard,
            workers=given.workers,
            progress=sys.stderr.isatty(),
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
