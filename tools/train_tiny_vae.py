#!/usr/bin/env python
"""Trains the VAE of the tiny pipeline and writes its weights (fp16 safetensors)."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from soar_mega.data import digits, tiny_vae


def _report(step: int, loss: float, seconds: float) -> None:
    print(f"step {step:5d}  loss {loss:.5f}  {seconds:6.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=tiny_vae.SHIPPED_WEIGHTS, help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and noise")
    parser.add_argument("--steps", type=int, default=2400, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=12, help="whole pictures in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    vae = tiny_vae.train_vae(
        seed=arguments.seed,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        report=_report,
    )
    tiny_vae.save_vae(vae, arguments.out)
    vae = tiny_vae.load_vae(arguments.out)
    scans = digits.load_scans("held_out")
    rng = np.random.default_rng(arguments.seed)
    scenes = digits.held_out_scenes(256, arguments.seed)
    pictures = np.stack([digits.draw_array(scene, scans, rng) for scene in scenes])
    again = tiny_vae.decode(vae, tiny_vae.encode(vae, pictures))
    print(f"PSNR on held-out pictures: {tiny_vae.psnr(pictures, again):.1f} dB")
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
