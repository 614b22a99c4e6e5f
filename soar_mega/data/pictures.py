"""Reads pictures and captions from shards and decodes them.

Legend: H height, W width in pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from soar_mega.data.decode.interface import DecodeJob, Decoder, Pixels
from soar_mega.data.errors import BadSampleError
from soar_mega.data.plan import Picture
from soar_mega.data.shards.index import ShardIndex

_T = TypeVar("_T")


@dataclass(frozen=True)
class Fetched:
    """What could be had of some pictures.

    Attributes:
        pixels: uint8 (H, W, 3) RGB of the good ones that were asked for in full; on the host, or
            where the decoder has put them.
        captions: Of all whose caption can be read.
        errors: What is wrong with the bad ones.
    """

    pixels: dict[Picture, Pixels]
    captions: dict[Picture, str]
    errors: dict[Picture, BadSampleError]


class PictureReader:
    """Reads with threads of its own, decodes with the decoder's; any thread may call ``fetch``.

    Args:
        index: The samples.
        decoder: Closed with the reader.
        num_workers: Threads that read; 0 reads in the caller.
    """

    def __init__(self, index: ShardIndex, decoder: Decoder, num_workers: int) -> None:
        self._index, self._decoder = index, decoder
        self._decoding = threading.Lock()
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None

    def fetch(self, pictures: Sequence[Picture], in_full: slice) -> Fetched:
        """The pictures ``in_full`` (a share of all) and the captions of all.

        Raises:
            DataError: Something else than single samples is wrong.
        """
        own = pictures[in_full]
        each = map if self._pool is None else self._pool.map
        captions: dict[Picture, str] = {}
        errors: dict[Picture, BadSampleError] = {}
        texts = each(_or_error(self._index.read_caption), [p.sample for p in pictures])
        images = each(_or_error(self._index.read_image), [p.sample for p in own])
        for picture, text in zip(pictures, texts, strict=True):
            if isinstance(text, BadSampleError):
                errors[picture] = text
            else:
                captions[picture] = text
        jobs: list[tuple[Picture, DecodeJob]] = []
        for picture, data in zip(own, images, strict=True):
            if isinstance(data, BadSampleError):
                errors[picture] = data
            elif picture not in errors:
                where = self._index.where(picture.sample)
                jobs.append((picture, DecodeJob(data, picture.view, where)))
        with self._decoding:
            results = self._decoder.decode([job for _, job in jobs])
        pixels: dict[Picture, Pixels] = {}
        for (picture, _), result in zip(jobs, results, strict=True):
            if isinstance(result, BadSampleError):
                errors[picture] = result
            else:
                pixels[picture] = result
        return Fetched(pixels, captions, errors)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()


def _or_error(read: Callable[[int], _T]) -> Callable[[int], _T | BadSampleError]:
    def attempt(sample: int) -> _T | BadSampleError:
        try:
            return read(sample)
        except BadSampleError as error:
            return error

    return attempt
