#!/usr/bin/env python
"""Writes a tiny Stable Diffusion 3.5 pipeline and WebDataset shards of digit pictures.

DIR/sd35/                   a StableDiffusion3Pipeline folder (transformer untrained, rest trained)
DIR/shards/train-*.tar      captioned 64 px pictures of handwritten numbers
DIR/shards/heldout-*.tar    the same with numbers and scans that training never shows
DIR/held_out_prompts.txt    the captions of the latter, one a line (.json: with the truth)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from soar_mega.data.tiny.pipeline import TinySizes, make_tiny


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = TinySizes()
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--seed", type=int, default=0, help="of pictures and weights (default: %(default)s)")
    add(
        "--train-pictures",
        type=int,
        default=4096,
        metavar="N",
        help="pictures in the training shards (default: %(default)s)",
    )
    add(
        "--held-out-pictures",
        type=int,
        default=256,
        metavar="N",
        help="pictures in the held-out shards, and prompts (default: %(default)s)",
    )
    add(
        "--num-layers",
        type=int,
        default=sizes.num_layers,
        metavar="N",
        help="blocks of the transformer, the first four with dual attention (default: %(default)s)",
    )
    add(
        "--num-attention-heads",
        type=int,
        default=sizes.num_attention_heads,
        metavar="N",
        help="attention heads of the transformer (default: %(default)s)",
    )
    add(
        "--attention-head-dim",
        type=int,
        default=sizes.attention_head_dim,
        metavar="N",
        help="width of a head (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        make_tiny(
            arguments.out,
            seed=arguments.seed,
            train_pictures=arguments.train_pictures,
            held_out_pictures=arguments.held_out_pictures,
            sizes=TinySizes(
                num_layers=arguments.num_layers,
                num_attention_heads=arguments.num_attention_heads,
                attention_head_dim=arguments.attention_head_dim,
            ),
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"pipeline: {arguments.out / 'sd35'}")
    print(f"shards:   {arguments.out / 'shards'}")
    print(f"prompts:  {arguments.out / 'held_out_prompts.txt'}")


if __name__ == "__main__":
    main()
