#!/usr/bin/env python
"""Writes the benchmark `handwriting`: a tiny Stable Diffusion 3.5 pipeline, pages, prompts.

DIR/sd35/                   a StableDiffusion3Pipeline folder, pretrained on raw pages
DIR/shards/raw-*.tar        64 px pages of digits with flaws and wrong captions, of pretraining
DIR/shards/curated-*.tar    pages that show what their captions say, for SFT and SOAR
DIR/shards/heldout-*.tar    combinations and scans that training never shows
DIR/prompts.txt             the captions of the latter
"""

from __future__ import annotations

import argparse
from pathlib import Path

from soar_mega.data.tiny.handwriting import make_handwriting


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--seed", type=int, default=0, help="of pages (default: 0)")
    for name, count in (("raw", 24576), ("curated", 4096), ("held-out", 512)):
        add(
            f"--{name}-pages",
            type=int,
            default=count,
            metavar="N",
            help=f"pages in the {name} shards; 0: none (default: {count})",
        )
    arguments = parser.parse_args()
    try:
        make_handwriting(
            arguments.out,
            seed=arguments.seed,
            raw_pages=arguments.raw_pages,
            curated_pages=arguments.curated_pages,
            held_out_pages=arguments.held_out_pages,
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"pipeline: {arguments.out / 'sd35'}")
    print(f"shards:   {arguments.out / 'shards'}")
    print(f"prompts:  {arguments.out / 'prompts.txt'}")


if __name__ == "__main__":
    main()
