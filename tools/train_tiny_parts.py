#!/usr/bin/env python
"""Trains the frozen parts of the tiny pipeline and writes their weights (fp16 safetensors).

``vae`` trains the AutoencoderKL on digit pictures (about 8 minutes of one core), ``text`` the three
text encoders on captions (about 1 minute); ``page-vae`` and ``page-text`` those of the benchmark
``handwriting``. The results are shipped under assets/, so this is needed only when pictures, the
captions or the sizes of these parts change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from soar_mega.data.tiny import digits, handwriting, page_text, pages
from soar_mega.data.tiny import text as tiny_text
from soar_mega.data.tiny import vae as tiny_vae


def _report(step: int, loss: float, seconds: float) -> None:
    print(f"step {step:5d}  loss {loss:.5f}  {seconds:6.1f} s", flush=True)


def _train_vae(arguments: argparse.Namespace) -> None:
    held_out = digits.load_scans("held_out")
    if arguments.part == "vae":
        train = tiny_vae.train_vae
        scenes = digits.held_out_scenes(256, arguments.seed)
        pictures = digits.draw_many(scenes, held_out, arguments.seed)
    else:
        train = handwriting.train_vae
        some = pages.make_pages(256, arguments.seed, held_out=True)
        pictures = pages.draw_pages(some, held_out, arguments.seed)
    vae = train(
        seed=arguments.seed,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        report=_report,
    )
    tiny_vae.save_vae(vae, arguments.out)
    vae = tiny_vae.load_vae(arguments.out)
    again = tiny_vae.decode(vae, tiny_vae.encode(vae, pictures))
    print(f"PSNR on held-out pictures: {tiny_vae.psnr(pictures, again):.1f} dB")


def _train_page_text(arguments: argparse.Namespace) -> None:
    tiny_text.save_encoders(page_text.train_text_parts(arguments.seed), arguments.out)


def _train_text(arguments: argparse.Namespace) -> None:
    parts = tiny_text.train_text_parts(tiny_text.TextSizes(), arguments.seed)
    tiny_text.save_encoders(parts, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="part", required=True)
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    for name, size, steps, peak, out in (
        ("vae", 12, 2400, 3e-3, tiny_vae.SHIPPED_WEIGHTS),
        ("page-vae", 16, 2000, 2e-3, handwriting.SHIPPED_VAE),
    ):
        vae = commands.add_parser(name, help="an AutoencoderKL", formatter_class=with_defaults)
        vae.add_argument("--out", type=Path, default=out, help="file to write")
        vae.add_argument("--steps", type=int, default=steps, help="optimiser steps")
        vae.add_argument("--batch-size", type=int, default=size, help="whole pictures in a step")
        vae.add_argument("--learning-rate", type=float, default=peak, help="peak learning rate")
        vae.set_defaults(function=_train_vae)
    for name, out, train in (
        ("text", tiny_text.SHIPPED_WEIGHTS, _train_text),
        ("page-text", page_text.SHIPPED_WEIGHTS, _train_page_text),
    ):
        text = commands.add_parser(name, help="three text encoders", formatter_class=with_defaults)
        text.add_argument("--out", type=Path, default=out, help="file to write")
        text.set_defaults(function=train)
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0, help="of weights, data and noise")
        command.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    arguments.function(arguments)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
