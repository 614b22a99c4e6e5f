"""A decoder for the time until ``soar_mega.data.decode`` has one behind its interface."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from soar_mega.data.decode.interface import DecodeJob, Decoder
from soar_mega.data.decode.pil import FORMATS, MAX_PIXELS, _to_rgb
from soar_mega.data.errors import BadSampleError, DataError


class _PilDecoder:
    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(max(num_threads, 1))

    def decode(self, jobs: Sequence[DecodeJob]) -> list[np.ndarray | BadSampleError]:
        return list(self._pool.map(_decode, jobs))

    def close(self) -> None:
        self._pool.shutdown()


def _decode(job: DecodeJob) -> np.ndarray | BadSampleError:
    try:
        with Image.open(io.BytesIO(job.data), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                return BadSampleError("too many pixels", f"{job.where}: {opened.size}")
            picture = _to_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
        return BadSampleError("truncated or damaged image", f"{job.where}: {error!r}")
    size = (job.view.width, job.view.height)
    scale = min(picture.width / size[0], picture.height / size[1])
    box_width, box_height = size[0] * scale, size[1] * scale
    left = int((picture.width - box_width) * job.view.place)
    top = int((picture.height - box_height) * job.view.place)
    box = (left, top, left + box_width, top + box_height)
    if scale == 1:
        return np.asarray(picture.crop((left, top, left + size[0], top + size[1])))
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS, box=box))


def make_decoder(name: str, num_threads: int) -> Decoder:
    if name != "pil":
        raise DataError(f"--decoder={name!r}: only pil is there. Give pil.")
    return _PilDecoder(num_threads)


def to_model_range(pixels_BHWC: Tensor) -> Tensor:
    return pixels_BHWC.permute(0, 3, 1, 2).float().contiguous().mul_(1 / 127.5).sub_(1)
