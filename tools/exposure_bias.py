#!/usr/bin/env python
"""Exposure bias made visible: how far models drift off the ideal path when they sample."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch

from soar_mega.config import ConfigError
from soar_mega.data.encoded.fingerprint import encoder_fingerprint
from soar_mega.data.validation import held_out
from soar_mega.evaluation.exposure_bias import measure
from soar_mega.evaluation.exposure_plot import plot
from soar_mega.evaluation.exposure_report import report, table
from soar_mega.evaluation.models import compute_dtype, find_model, load_transformer
from soar_mega.evaluation.plan import label_models
from soar_mega.parallel.mesh import Mesh

_EPILOG = """\
examples:
  python tools/exposure_bias.py sft=runs/sft soar=runs/soar --shards 'encoded/heldout/*.tar' \\
      --out out/exposure
  python tools/exposure_bias.py models/sd35 --shards 'heldout-*.tar' --resolution 512 --out out/sd35

DIR gets exposure_bias.json and exposure_bias.png; docs/evaluation.md says what they show. All
models see the same samples and noise, so differences between them (in the json, from the first)
are paired. One process; on CUDA if there is a device (bf16), else on the CPU (fp32).
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a diffusers pipeline folder, owner/name@COMMIT of the hub, a checkpoint of ours, or "
        "a run folder (its newest checkpoint); LABEL=MODEL names its line (default: the folder's "
        "name); all with the same VAE and text encoders",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        required=True,
        metavar="SHARDS",
        help="held-out samples: tars of pictures and captions, or encoded ones; paths, globs or "
        "braces",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; absent or empty"
    )
    parser.add_argument(
        "--samples", type=int, default=64, help="the first so many of SHARDS (default: 64)"
    )
    parser.add_argument("--steps", type=int, default=28, help="sampling steps (default: 28)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=4.5,
        help="classifier-free guidance scale; 1 switches it off (default: 4.5)",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="side of the pictures (default: as SHARDS were encoded; for pictures what the first "
        "model's config names)",
    )
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="TOKENS",
        help="T5 tokens (default: as SHARDS were encoded; for pictures what the first model, a "
        "checkpoint, was trained with, else 256)",
    )
    parser.add_argument("--batch", type=int, default=16, help="samples at a time (default: 16)")
    parser.add_argument(
        "--weights",
        choices=("ema", "plain"),
        default="ema",
        help="which weights of checkpoints; a diffusers folder has one kind (default: ema)",
    )
    return parser


def _measure(args: argparse.Namespace) -> None:
    mesh = Mesh.single("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(mesh.device)
    sources = {
        label: find_model(path, args.weights) for label, path in label_models(args.models).items()
    }
    first = next(iter(sources.values()))
    for label, source in sources.items():
        if source.base != first.base and (
            encoder_fingerprint(source.base) != encoder_fingerprint(first.base)
        ):
            raise ValueError(
                f"{label}: its VAE, text encoders or tokenizers ({source.base}) are not those of "
                f"the first model ({first.base}), so its latents do not compare"
            )
    clean_NCHW, prompts, empty = held_out(
        args.shards,
        first.base,
        args.samples,
        resolution=args.resolution,
        max_sequence_length=args.max_sequence_length,
        fallback=(first.resolution, first.max_sequence_length),
        dtype=dtype,
        device=mesh.device,
    )
    found = {}
    for label, source in sources.items():
        print(f"measuring {label}", flush=True)
        found[label] = measure(
            load_transformer(source, mesh, dtype),
            prompts,
            empty,
            Path(source.base) / "scheduler",
            clean_NCHW=clean_NCHW,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            batch_size=args.batch,
        )
    result = report(found)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "exposure_bias.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out / "exposure_bias.png")
    print(table(result))


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, write and draw."""
    args = _parser().parse_args(arguments)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the picture needs matplotlib: install soar-mega[eval]")
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"--out {args.out} is not empty")
        _measure(args)
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
