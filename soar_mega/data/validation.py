"""Held-out samples, encoded once.

Legend: C/H/W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soar_mega.data.buckets import Bucket
from soar_mega.data.decode.interface import View
from soar_mega.data.decode.model_range import to_model_range
from soar_mega.data.decode.pil import decode_one
from soar_mega.data.encoded.read import EncodedSet
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.errors import DataError
from soar_mega.data.model_folder import ModelFacts
from soar_mega.data.shards.index import ShardIndex, build_index
from soar_mega.passes import TextCondition

_CHUNK = 16  # pictures encoded at a time


def load_validation(
    index: ShardIndex,
    encoders: FrozenEncoders,
    num_samples: int,
    *,
    resolution: int,
    max_sequence_length: int,
) -> tuple[Tensor, TextCondition]:
    """The first ``num_samples`` of a validation index, the same at every call and on every rank.

    Returns:
        Latents (num_samples, C, H, W) at the posterior's mean, shifted and scaled, and the
        captions' conditions.

    Raises:
        DataError: Fewer samples than asked for, or one cannot be read.
    """
    if not 1 <= num_samples <= len(index):
        raise DataError(
            f"validation.num_samples={num_samples}: must be 1 to {len(index)}, the number of "
            "samples in validation.shards. Lower it or add shards."
        )
    encoders.latent_shape(resolution)
    view = View(resolution, resolution)
    means: list[Tensor] = []
    for some in torch.arange(num_samples).split(_CHUNK):  # bounds the memory
        pixels = [
            decode_one(index.read_image(n), view, where=index.where(n)) for n in some.tolist()
        ]
        pixels_BHWC = torch.from_numpy(np.stack(pixels))
        means.append(encoders.encode_images(to_model_range(pixels_BHWC))[0])
    captions = [index.read_caption(sample) for sample in range(num_samples)]
    latents_BCHW = encoders.normalise(torch.cat(means))
    return latents_BCHW, encoders.encode_prompts(captions, max_sequence_length)


def encoded_validation(
    encoded: EncodedSet,
    facts: ModelFacts,
    num_samples: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, TextCondition]:
    """``load_validation`` of an encoded set: its first square pictures.

    Args:
        dtype: Of the text.
        device: Where the result goes.

    Raises:
        DataError: Fewer square samples than asked for, or one cannot be read.
    """
    resolution = encoded.descriptor.preprocessing.resolution
    square = Bucket(resolution, resolution)
    samples = np.flatnonzero(encoded.buckets_N == encoded.buckets.index(square))[:num_samples]
    if len(samples) < num_samples:
        raise DataError(
            f"validation.num_samples={num_samples}: validation.shards hold {len(samples)} samples "
            f"of {resolution} x {resolution} pixels. Lower it or add shards."
        )
    rows_BN = encoded.new_rows(square, num_samples)
    numbers = samples.tolist()
    for error in [*encoded.read(numbers, rows_BN), *encoded.check_finite(numbers, rows_BN)]:
        if error is not None:
            raise error
    encoded.close()
    batch = encoded.unpack(rows_BN.to(device), square, dtype)
    return facts.normalise(batch.mean_BCHW), batch.text


def held_out(
    shards: Sequence[str],
    folder: Path | str,
    num_samples: int,
    *,
    resolution: int | None,
    max_sequence_length: int | None,
    fallback: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, TextCondition, TextCondition]:
    """``load_validation`` or ``encoded_validation``, whichever fits the shards, for a tool.

    Args:
        shards: Of pictures, or encoded; paths, globs or braces.
        folder: A diffusers folder with the encoders; encoded shards must be of the same.
        num_samples: The first so many.
        resolution: Side of the pictures in pixels; None: what encoded shards were made with.
        max_sequence_length: T5 tokens; None: likewise.
        fallback: The two for pictures where they are None; tokens at most the T5 tokenizer's limit.
        dtype: Of the text and its encoders.
        device: Where to encode, and where the result goes.

    Returns:
        Latents (num_samples, C, H, W), shifted and scaled, the captions' conditions, and the empty
        prompt's.

    Raises:
        DataError: Fewer samples than asked for, one cannot be read, or encoded shards made with
            other encoders, resolution or length.
    """
    index = build_index(list(shards), setting="--shards")
    if num_samples > len(index):
        raise DataError(f"--samples {num_samples}: --shards hold {len(index)}. Lower it.")
    if index.encoded:
        encoded = EncodedSet.open(index, setting="--shards")
        made = encoded.descriptor.preprocessing
        encoded.check(
            folder,
            resolution=resolution or made.resolution,
            max_sequence_length=max_sequence_length or made.max_sequence_length,
            buckets=made.buckets,
            setting="--shards",
        )
        text_BTE, pooled_BV = encoded.empty.text_BTE, encoded.empty.pooled_BV
        empty = TextCondition(text_BTE.to(device, dtype), pooled_BV.to(device, dtype))
        facts = ModelFacts.read(folder)
        found = encoded_validation(encoded, facts, num_samples, dtype=dtype, device=device)
        return *found, empty
    encoders = FrozenEncoders.load(folder, device=device, dtype=dtype)
    limit = encoders.tokenizers[2].model_max_length if encoders.t5 is not None else fallback[1]
    tokens = max_sequence_length or min(fallback[1], limit)
    found = load_validation(
        index,
        encoders,
        num_samples,
        resolution=resolution or fallback[0],
        max_sequence_length=tokens,
    )
    return *found, encoders.encode_prompts([""], tokens)
