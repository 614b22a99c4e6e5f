"""From samples of picture shards to payloads.

Legend: B samples, H/W pixels, N bytes of a payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from soar_mega.data.buckets import Bucket, bucket_of
from soar_mega.data.decode.handover import stack_pixels
from soar_mega.data.decode.interface import DecodeJob, Decoder, Pixels, View
from soar_mega.data.decode.model_range import to_model_range
from soar_mega.data.encoded.format import PayloadLayout
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.errors import BadSampleError
from soar_mega.data.shards.index import ShardIndex


@dataclass(frozen=True)
class Encoded:
    """A sample's payload and caption."""

    sample: int
    bucket: Bucket
    payload: np.ndarray
    caption: str


@dataclass(frozen=True)
class Refused:
    """A sample that is left out; why in a few words, and more about that."""

    sample: int
    kind: str
    detail: str


@dataclass(frozen=True)
class _Picture:
    sample: int
    bucket: Bucket
    pixels_HW3: Pixels
    caption: str


class SampleEncoder:
    """Encodes samples; the next pictures are read and decoded while some are encoded.

    Args:
        index: The samples.
        buckets: Of the set.
        encoders: The models; their bits of a sample depend on that sample alone.
        layout: Of the payloads.
        decoder: For the pictures.
        batch_size: Samples that are decoded and encoded together.
    """

    def __init__(
        self,
        index: ShardIndex,
        buckets: tuple[Bucket, ...],
        encoders: FrozenEncoders,
        layout: PayloadLayout,
        decoder: Decoder,
        batch_size: int,
    ) -> None:
        self._index, self._decoder, self._batch_size = index, decoder, batch_size
        self._buckets, self._buckets_N = buckets, bucket_of(buckets, index.sizes())
        self._encoders, self._layout = encoders, layout

    def encode(self, samples: range) -> Iterator[Encoded | Refused]:
        """Every sample, bucket by bucket: a call of the VAE takes pictures of one size."""
        ordered = sorted(samples, key=lambda sample: (int(self._buckets_N[sample]), sample))
        starts = range(0, len(ordered), self._batch_size)
        parts = [ordered[start : start + self._batch_size] for start in starts]
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self._fetch, part) for part in parts[:1]]
            for number in range(len(parts)):
                fetched = ahead.pop().result()
                ahead = [pool.submit(self._fetch, part) for part in parts[number + 1 : number + 2]]
                yield from self._encode(fetched)

    def _fetch(self, samples: list[int]) -> list[_Picture | Refused]:
        found: dict[int, _Picture | Refused] = {}
        whole: list[tuple[int, Bucket, str]] = []
        jobs: list[DecodeJob] = []
        for sample in samples:
            bucket = self._buckets[self._buckets_N[sample]]
            try:
                caption = self._index.read_caption(sample)
                data = self._index.read_image(sample)
            except BadSampleError as error:
                found[sample] = Refused(sample, error.kind, str(error))
                continue
            whole.append((sample, bucket, caption))
            view = View(bucket.height, bucket.width)
            jobs.append(DecodeJob(data, view, self._index.where(sample)))
        decoded = self._decoder.decode(jobs)
        for (sample, bucket, caption), pixels in zip(whole, decoded, strict=True):
            if isinstance(pixels, BadSampleError):
                found[sample] = Refused(sample, pixels.kind, str(pixels))
            else:
                found[sample] = _Picture(sample, bucket, pixels, caption)
        return [found[sample] for sample in samples]

    def _encode(self, fetched: list[_Picture | Refused]) -> Iterator[Encoded | Refused]:
        by_bucket: dict[Bucket, list[_Picture]] = {}
        for item in fetched:
            if isinstance(item, Refused):
                yield item
            else:
                by_bucket.setdefault(item.bucket, []).append(item)
        for pictures in by_bucket.values():
            yield from self._encode_bucket(pictures)

    def _encode_bucket(self, pictures: list[_Picture]) -> Iterator[Encoded | Refused]:
        pixels_BHW3 = stack_pixels([one.pixels_HW3 for one in pictures], self._encoders.device)
        pixels_B3HW = to_model_range(pixels_BHW3)
        mean_BCHW, logvar_BCHW = self._encoders.encode_images(pixels_B3HW)
        captions = [picture.caption for picture in pictures]
        text = self._encoders.encode_prompts(captions, self._layout.t5_tokens)
        rows_BN = self._layout.pack(mean_BCHW, logvar_BCHW, text)
        finite_B = rows_BN.view(torch.bfloat16).isfinite().all(dim=1).tolist()
        for picture, row_N, finite in zip(pictures, rows_BN, finite_B, strict=True):
            if finite:
                yield Encoded(picture.sample, picture.bucket, row_N.numpy(), picture.caption)
            else:
                where = self._index.where(picture.sample)
                yield Refused(picture.sample, "not finite", f"{where}: NaN or infinity encoded")
