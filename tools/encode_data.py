#!/usr/bin/env python
"""Encodes picture shards once: latents and text embeddings into shards that training reads."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from soar_mega import hub
from soar_mega.config import ConfigError
from soar_mega.data.encoded.run import DTYPES, EncodeProcess, EncodeSettings, encode
from soar_mega.data.shards.index import build_index
from soar_mega.launch.environment import ProcessEnvironment

_EPILOG = """\
OUT gets encoded-000000.tar ... with an index beside each, empty.safetensors (the empty prompt),
refused.jsonl (what was left out, and why) and, when all is there, encoded.json. Train on it with
data.shards=OUT/*.tar and the same model.pretrained, resolution, sequence length and aspect ratio.

Any number of processes share the work: start it with torchrun or srun. A run that was stopped goes
on when the same command is given again, with more or fewer processes too. One run at a time may
write to OUT. CUDA is used if there is a device.

examples:
  tools/encode_data.py 'shards/*.tar' --pretrained sd35 --out encoded --resolution 512
  torchrun --nproc-per-node 8 tools/encode_data.py 'shards/*.tar' --pretrained sd35 --out encoded \\
      --resolution 512 --max-sequence-length 256
  srun tools/encode_data.py 'shards/*.tar' --pretrained sd35 --out encoded --resolution 512
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars of pictures and captions: paths, globs or braces, as data.shards",
    )
    add(
        "--pretrained",
        required=True,
        metavar="DIR",
        help="diffusers folder, or owner/name@COMMIT of the hub: its VAE and text encoders are "
        "used; as model.pretrained",
    )
    add("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    add(
        "--resolution",
        type=int,
        required=True,
        metavar="PIXELS",
        help="side of the square pictures, as data.resolution",
    )
    add(
        "--max-sequence-length",
        type=int,
        default=77,
        metavar="N",
        help="T5 tokens, as data.max_sequence_length (default: %(default)s)",
    )
    add(
        "--max-aspect-ratio",
        type=float,
        default=1.0,
        metavar="RATIO",
        help="longest side over shortest of the widest bucket, as data.max_aspect_ratio; 1 crops "
        "every picture to the square (default: %(default)s)",
    )
    add(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="input samples a shard is made of, at most (default: %(default)s)",
    )
    add(
        "--decoder",
        choices=["pil", "dali"],
        default="pil",
        help="what decodes the pictures, as data.decoder (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=list(DTYPES),
        default="bf16",
        help="of the text encoders, as precision.compute_dtype; the VAE runs in fp32, and bf16 is "
        "stored (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="samples held at a time; changes no bit of the result (default: %(default)s)",
    )
    add(
        "--num-decode-threads",
        type=int,
        default=2,
        metavar="N",
        help="threads decoding pictures, of each process (default: %(default)s)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        place = ProcessEnvironment.read(os.environ)
        lead = f"rank {place.rank}: " if place.world_size > 1 else ""
        report = encode(
            build_index(given.shards, setting="SHARDS"),
            hub.resolve(given.pretrained, setting="--pretrained"),
            given.out,
            EncodeSettings(
                resolution=given.resolution,
                max_sequence_length=given.max_sequence_length,
                max_aspect_ratio=given.max_aspect_ratio,
                samples_per_shard=given.samples_per_shard,
                decoder=given.decoder,
                dtype=given.dtype,
            ),
            EncodeProcess(
                rank=place.rank,
                world_size=place.world_size,
                device=_device(place),
                batch_size=given.batch_size,
                num_decode_threads=given.num_decode_threads,
                tell=lambda line: print(lead + line, file=sys.stderr, flush=True),
                progress=sys.stderr.isatty() and place.world_size == 1,
            ),
        )
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(lead + str(report))
    return 0


def _device(place: ProcessEnvironment) -> torch.device:
    count = torch.cuda.device_count()
    if count == 0:
        return torch.device("cpu")
    return torch.device("cuda", place.local_rank % count)


if __name__ == "__main__":
    sys.exit(main())
