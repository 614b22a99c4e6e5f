#!/usr/bin/env python
"""Write the transformer of a diffusers folder as a checkpoint of ours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.from_diffusers import convert_from_diffusers

_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # to safetensors codes
_EPILOG = """\
examples:
  # a published model as a verified starting point of runs in any layout
  python tools/convert_from_diffusers.py models/sd35_medium starts/sd35_medium
  python -m soar_mega.train configs/sd35_medium_sft.yaml model.init_from=starts/sd35_medium

DST holds weights only: model.init_from starts a new run from it, checkpoint.resume does not. Keys
that are missing, unexpected or of another shape are listed. Weights are read and written piece by
piece: memory stays small whatever the model. DST appears complete or not at all.
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="diffusers pipeline folder, or a transformer's; one safetensors file or shards",
    )
    parser.add_argument("out", type=Path, metavar="DST", help="folder to write; must be absent")
    parser.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        help="cast the weights (default: as in SRC); the position table is never cast",
    )
    parser.add_argument(
        "--hash",
        choices=("xxh3-128", "sha256"),
        default="xxh3-128",
        help="of the files, in the manifest (default: xxh3-128)",
    )
    args = parser.parse_args(arguments)
    try:
        out = convert_from_diffusers(
            args.source, args.out, _DTYPES[args.dtype] if args.dtype else None, args.hash
        )
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
