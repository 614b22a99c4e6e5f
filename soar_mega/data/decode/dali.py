"""Picture bytes to pixels with NVIDIA DALI, and with PIL what DALI should not see.

DALI gives no result for a whole batch when one picture of it is bad, and may not work after. So it
is given only JPEGs whose structure was walked through and found whole; where it fails all the same,
its pipeline is made anew and PIL decodes the batch.

Legend: H height, W width, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from soar_mega.data.decode.geometry import Placement, place
from soar_mega.data.decode.interface import DecodeJob
from soar_mega.data.decode.jpeg import plain_jpeg_size
from soar_mega.data.decode.pil import MAX_PIXELS, PilDecoder, open_picture, orientation
from soar_mega.data.errors import BadSampleError, DataError

Filter = Literal["lanczos", "triangular"]

_BATCH_PIXELS = 2 * MAX_PIXELS  # decoded at once, in full: 400 MB


@dataclass(frozen=True)
class _Accepted:
    """A job for DALI: its number, its place in the picture, and the picture's pixels."""

    number: int
    placement: Placement
    pixels: int


class DaliDecoder:
    """Decodes plain JPEGs with DALI and everything else with PIL; a ``Decoder``.

    With ``device_id`` JPEGs are decoded and resized on that GPU. This way has not been run on a GPU
    yet.

    Args:
        num_threads: DALI's threads, and PIL's.
        batch_size: Pictures that DALI decodes at a time, at most.
        device_id: CUDA device; None decodes on the CPU.
        filter: Of resizing: Lanczos as PIL's, or triangular, which is faster and softer. PIL's
            pictures are resized with Lanczos always.

    Attributes:
        rebuilds: How often DALI failed and its pipeline was made anew.

    Raises:
        DataError: DALI is not installed.
    """

    def __init__(
        self,
        num_threads: int,
        batch_size: int,
        device_id: int | None = None,
        filter: Filter = "lanczos",
    ) -> None:
        self._num_threads, self._batch_size = max(1, num_threads), batch_size
        self._device_id, self._filter = device_id, filter
        self.rebuilds = 0
        self._pipeline = self._build()
        self._pil = PilDecoder(num_threads)

    def decode(self, jobs: Sequence[DecodeJob]) -> list[np.ndarray | BadSampleError]:
        """uint8 (H, W, C) RGB of each job, or why it cannot be had."""
        results: dict[int, np.ndarray | BadSampleError] = {}
        accepted = [found for number, job in enumerate(jobs) if (found := _accept(number, job))]
        for batch in self._batches(accepted):
            results.update(self._run(jobs, batch))
        rest = [number for number in range(len(jobs)) if number not in results]
        decoded = self._pil.decode([jobs[number] for number in rest])
        results.update(zip(rest, decoded, strict=True))
        return [results[number] for number in range(len(jobs))]

    def close(self) -> None:
        """Stop the threads and free the pipeline's memory."""
        self._pipeline = None
        self._pil.close()

    def _batches(self, accepted: list[_Accepted]) -> Iterator[list[_Accepted]]:
        batch: list[_Accepted] = []
        pixels = 0
        for one in accepted:
            full = len(batch) == self._batch_size or pixels + one.pixels > _BATCH_PIXELS
            if batch and full:
                yield batch
                batch, pixels = [], 0
            batch.append(one)
            pixels += one.pixels
        if batch:
            yield batch

    def _run(self, jobs: Sequence[DecodeJob], batch: list[_Accepted]) -> dict[int, np.ndarray]:
        """Pixels by number of the job; none if DALI fails."""
        places = [one.placement for one in batch]
        try:
            (output,) = self._pipeline.run(
                encoded=[np.frombuffer(jobs[one.number].data, np.uint8) for one in batch],
                start=[np.array([p.box[1], p.box[0]], np.float32) for p in places],
                end=[np.array([p.box[3], p.box[2]], np.float32) for p in places],
                size=[np.array([p.height, p.width], np.float32) for p in places],
            )
            pixels = output.as_cpu()
            return {
                one.number: one.placement.finish(np.asarray(pixels.at(row)))
                for row, one in enumerate(batch)
            }
        except Exception:  # of any C++ exception's Python name
            self.rebuilds += 1
            self._pipeline = None  # the old one's memory goes before the new one's comes
            self._pipeline = self._build()
            return {}

    def _build(self) -> Any:
        try:
            from nvidia.dali import Pipeline, fn, types
        except ImportError as error:
            raise DataError(
                "data.decoder = dali: NVIDIA DALI is not installed. Install it with "
                "`pip install soar-mega[dali]`, or set data.decoder = pil."
            ) from error
        on_gpu: dict[str, Any] = {"device": "mixed", "jpeg_fancy_upsampling": True}
        where = {"device": "cpu"} if self._device_id is None else on_gpu
        kernels = {"lanczos": types.INTERP_LANCZOS3, "triangular": types.INTERP_LINEAR}
        # Inputs of `run` are for that run: nothing may be fetched ahead.
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start, end, size = (
                fn.external_source(name=name, dtype=types.FLOAT, ndim=1)
                for name in ("start", "end", "size")
            )
            decoded = fn.decoders.image(
                encoded, output_type=types.RGB, adjust_orientation=False, **where
            )
            resized = fn.resize(
                decoded,
                roi_start=start,
                roi_end=end,
                size=size,
                interp_type=kernels[self._filter],
                antialias=True,
            )
            pipeline.set_outputs(resized)
        pipeline.build()
        return pipeline


def _accept(number: int, job: DecodeJob) -> _Accepted | None:
    """None for what DALI should not see; PIL then says what is wrong with it."""
    size = plain_jpeg_size(job.data)
    if size is None:
        return None
    try:
        opened = open_picture(job.data, job.where)
    except BadSampleError:
        return None
    # PIL reads less strictly: where the two see different pictures, it is PIL's.
    if not isinstance(opened, JpegImageFile) or opened.size != size:
        return None
    placement = place(*size, orientation(opened), job.view)
    return _Accepted(number, placement, size[0] * size[1])
