#!/usr/bin/env python
"""Write a checkpoint of ours as a diffusers folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.exporter import export, export_single_file
from soar_mega.checkpoint.safetensors_files import MAX_SHARD_BYTES

_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # to safetensors codes
_EPILOG = """\
examples:
  # the newest checkpoint of a run, as a folder for StableDiffusion3Pipeline.from_pretrained
  python tools/convert_to_diffusers.py runs/sft exports/sft
  # the same, checked against diffusers' own forward
  python tools/convert_to_diffusers.py runs/sft exports/sft --verify
  # a certain checkpoint's plain weights in bf16, the transformer alone
  python tools/convert_to_diffusers.py runs/sft/checkpoints/step-00000500 exports/t \\
      --weights plain --dtype bf16 --transformer-only
  # one file for ComfyUI
  python tools/convert_to_diffusers.py runs/sft exports/sft.safetensors --single-file --dtype bf16

OUT gets transformer/ from the checkpoint and every other part of the pipeline from the base, with a
README.md that says where the weights come from. The checkpoint's hashes are compared first. Weights
are read and written piece by piece: memory stays small whatever the model. OUT appears complete or
not at all.
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint (.../checkpoints/step-00000500), or a run folder: its newest checkpoint",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; absent or empty")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="diffusers folder, or owner/name@COMMIT of the hub, that gives VAE, text encoders, "
        "tokenizers and scheduler (default: the model.pretrained recorded in the checkpoint)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "plain"),
        default="ema",
        help="the moving average of the weights, or the weights themselves (default: ema)",
    )
    parser.add_argument(
        "--transformer-only",
        action="store_true",
        help="write the transformer alone, right into OUT (for SD3Transformer2DModel)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        help="cast the weights (default: as in the checkpoint, fp32); the position table is cast "
        "only if that loses no bit",
    )
    parser.add_argument(
        "--single-file",
        action="store_true",
        help="write the transformer as one .safetensors file, OUT, in the key layout in which SD3 "
        "was first published (ComfyUI and SD3Transformer2DModel.from_single_file read it)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=MAX_SHARD_BYTES / 1e9,
        metavar="GB",
        help="largest safetensors file, in 10^9 bytes (default: %(default)g)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="open the result with diffusers and compare a forward with ours; needs memory for the "
        "model in fp32",
    )
    args = parser.parse_args(arguments)
    dtype = _DTYPES[args.dtype] if args.dtype else None
    try:
        if args.single_file:
            out = export_single_file(args.checkpoint, args.out, args.weights, dtype)
        else:
            out = export(
                args.checkpoint,
                args.out,
                base=args.base,
                weights=args.weights,
                transformer_only=args.transformer_only,
                dtype=dtype,
                max_shard_bytes=int(args.max_shard_size * 1e9),
            )
        print(f"wrote {out}")
        if args.verify:
            # Not above: it imports torch, seconds that a plain conversion does not need.
            from soar_mega.training.verify_export import verify_export

            difference = verify_export(args.checkpoint, out, args.weights, dtype)
            print(f"diffusers' forward equals ours to {difference:.1e} of the largest output")
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
