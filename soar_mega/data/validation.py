"""Held-out samples, encoded once.

Legend: C/H/W latent channels, height, width.
"""

from __future__ import annotations

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
from soar_mega.data.shards.index import ShardIndex
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
