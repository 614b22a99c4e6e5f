#!/usr/bin/env python
"""Draw pictures through our model, from a diffusers folder or from a checkpoint of ours."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from soar_mega.data.encoders import FrozenEncoders
from soar_mega.evaluation.models import compute_dtype, find_model, load_transformer
from soar_mega.evaluation.painter import Batch, Painter
from soar_mega.parallel.mesh import Mesh
from soar_mega.sampling.pictures import grid

_EPILOG = """\
examples:
  python tools/generate.py models/sd35 --prompt "a red fox in snow" --out out/fox
  python tools/generate.py runs/sft --prompts-file prompts.txt --out out/sft --seed 7 --batch 8
  python tools/generate.py runs/sft/checkpoints/step-00000500 --weights plain --prompt "a 7" --out o

DIR gets 0000.png, 0001.png, ..., grid.png with all of them, and pictures.json with prompt and seed
of each. Picture number i is drawn with seed SEED + i; the same seed gives the same starting noise
on every machine. One process; on CUDA if there is a device (bf16), else on the CPU (fp32).
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a diffusers pipeline folder, owner/name@COMMIT of the hub, a checkpoint of ours, or "
        "a run folder (its newest checkpoint); a checkpoint's text encoders and VAE come from its "
        "model.pretrained",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt; give it again for more pictures",
    )
    prompts.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="a text file with one prompt a line"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; absent or empty"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first picture (default: 0)"
    )
    parser.add_argument("--steps", type=int, default=28, help="sampling steps (default: 28)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=4.5,
        help="classifier-free guidance scale; 1 switches it off (default: 4.5)",
    )
    for name in ("--height", "--width"):
        parser.add_argument(
            name, type=int, metavar="PIXELS", help="default: what the model config names"
        )
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="TOKENS",
        help="T5 tokens (default: what the checkpoint was trained with; for a diffusers folder 256 "
        "or its T5 tokenizer's limit)",
    )
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time (default: 4)")
    parser.add_argument(
        "--weights",
        choices=("ema", "plain"),
        default="ema",
        help="which weights of a checkpoint; a diffusers folder has one kind (default: ema)",
    )
    return parser


def _draw(args: argparse.Namespace, prompts: list[str]) -> None:
    mesh = Mesh.single("cuda" if torch.cuda.is_available() else "cpu")
    source = find_model(args.model, args.weights)
    height, width = args.height or source.resolution, args.width or source.resolution
    source.check_size(height, width, "--height or --width")
    dtype = compute_dtype(mesh.device)
    painter = Painter(
        load_transformer(source, mesh, dtype),
        FrozenEncoders.load(source.base, device=mesh.device, dtype=dtype),
        source.base / "scheduler",
        mesh,
        latent_shape=source.latent_shape(height, width),
        max_sequence_length=args.max_sequence_length or source.max_sequence_length,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        batch_size=args.batch,
    )
    seeds = [args.seed + number for number in range(len(prompts))]
    pictures = []
    for start in range(0, len(prompts), args.batch):
        own = slice(start, start + args.batch)
        pictures += painter.draw([Batch(prompts[own], seeds[own])])[0]
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
        picture.save(args.out / f"{number:04d}.png")
        lines.append({"file": f"{number:04d}.png", "prompt": prompt, "seed": seed})
    grid(pictures).save(args.out / "grid.png")
    (args.out / "pictures.json").write_text(json.dumps(lines, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, draw and save."""
    args = _parser().parse_args(arguments)
    try:
        if args.batch < 1:
            raise ValueError(f"--batch = {args.batch} must be at least 1")
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"--out {args.out} is not empty")
        prompts = args.prompt
        if args.prompts_file:
            lines = args.prompts_file.read_text().splitlines()
            prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts-file {args.prompts_file} holds no prompt")
        _draw(args, prompts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
