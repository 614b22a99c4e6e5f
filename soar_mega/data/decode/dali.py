"""Picture bytes to pixels with NVIDIA DALI, and with PIL what DALI should not see.

DALI's Lanczos takes longer than its decoding, so a picture that is at least twice too large is
first halved by averaging 2 x 2 pixels (PIL's decoder of JPEGs can scale down, DALI's cannot).
Only the box, and what the filter sees around it, is decoded.

DALI gives no result for a whole batch when one picture of it is bad, and may not work after. So it
is given only JPEGs whose structure was walked through and found whole; where it fails all the same,
its pipeline is made anew and PIL decodes the batch.

With a GPU, JPEGs are decoded and resized there (DALI calls that mixed: the host reads the entropy
coding's structure), and the pixels stay there. What goes to PIL is the same as without one.

Legend: H height, W width, C = 3 channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from soar_mega.data.decode.geometry import Placement, place
from soar_mega.data.decode.handover import GpuHandover
from soar_mega.data.decode.interface import DecodeJob, Pixels
from soar_mega.data.decode.jpeg import plain_jpeg_size
from soar_mega.data.decode.pil import MAX_PIXELS, PilDecoder, open_picture, orientation
from soar_mega.data.errors import BadSampleError, DataError

Filter = Literal["lanczos", "triangular"]

_BATCH_PIXELS = 2 * MAX_PIXELS  # decoded at once, in full: 400 MB
_REACH = 4  # pixels of the result that a filter looks past the box; Lanczos needs 3


@dataclass(frozen=True)
class _Accepted:
    """A job for DALI.

    Attributes:
        number: Of the job.
        placement: Its place in the picture.
        pixels: Of the picture.
        part: (left, top, right, bottom) of what is decoded, whole pixels.
        halved: Whether that is halved before it is resized.
    """

    number: int
    placement: Placement
    pixels: int
    part: tuple[int, int, int, int]
    halved: bool

    @property
    def resized(self) -> bool:
        """Else the part that is decoded is the result."""
        left, top, right, bottom = self.part
        return (right - left, bottom - top) != (self.placement.width, self.placement.height)

    def inputs(self) -> dict[str, np.ndarray]:
        """What the pipeline wants to know of it."""
        left, top, right, bottom = self.part
        height, width = -(-(bottom - top) // 2), -(-(right - left) // 2)
        scale = 2 if self.halved else 1
        x0, y0, x1, y1 = self.placement.box
        return {
            "corner": np.array([top, left], np.int32),
            "extent": np.array([bottom - top, right - left], np.int32),
            "halved": np.array(self.halved),
            "half": np.array([height, width], np.float32),
            "resized": np.array(self.resized),
            "start": np.array([(y0 - top) / scale, (x0 - left) / scale], np.float32),
            "end": np.array([(y1 - top) / scale, (x1 - left) / scale], np.float32),
            "size": np.array([self.placement.height, self.placement.width], np.float32),
        }


class DaliDecoder:
    """Decodes plain JPEGs with DALI and everything else with PIL; a ``Decoder``.

    With ``device_id`` JPEGs are decoded and resized on that GPU, and ``decode`` gives tensors there
    for them, arrays on the host for the rest. This way has not been run on a GPU yet.

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
        self._handover = None if device_id is None else GpuHandover(device_id)
        self._pipeline = self._build()
        self._pil = PilDecoder(num_threads)

    def decode(self, jobs: Sequence[DecodeJob]) -> list[Pixels | BadSampleError]:
        """uint8 (H, W, C) RGB of each job, or why it cannot be had."""
        results: dict[int, Pixels | BadSampleError] = {}
        found = [_accept(number, job, self._filter) for number, job in enumerate(jobs)]
        accepted = [one for one in found if one is not None]
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

    def _run(self, jobs: Sequence[DecodeJob], batch: list[_Accepted]) -> dict[int, Pixels]:
        """Pixels by number of the job; none if DALI fails."""
        inputs = [one.inputs() for one in batch]
        try:
            (output,) = self._pipeline.run(
                encoded=[np.frombuffer(jobs[one.number].data, np.uint8) for one in batch],
                **{name: [values[name] for values in inputs] for name in inputs[0]},
            )
        except Exception:  # of any C++ exception's Python name
            self.rebuilds += 1
            self._pipeline = None  # the old one's memory goes before the new one's comes
            self._pipeline = self._build()
            return {}
        finished: Sequence[Pixels]
        if self._handover is not None:
            finished = self._handover.take(output, [one.placement for one in batch])
        else:
            found = [np.asarray(output.at(row)) for row in range(len(batch))]
            finished = [one.placement.finish(f) for one, f in zip(batch, found, strict=True)]
        return {one.number: pixels for one, pixels in zip(batch, finished, strict=True)}

    def _build(self) -> Any:
        pipeline = self._graph()
        pipeline.build()
        return pipeline

    def _graph(self) -> Any:
        try:
            from nvidia.dali import fn, pipeline_def, types
        except ImportError as error:
            raise DataError(
                "data.decoder = dali: NVIDIA DALI is not installed. Install it with "
                "`pip install soar-mega[dali]`, or set data.decoder = pil."
            ) from error
        # As the CPU's decoder interpolates colours. The GPU's decoding engine gets a share of each
        # batch, so a picture's bits would depend on its neighbours there: it gets none.
        on_gpu = {"device": "mixed", "jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0}
        where: dict[str, Any] = {"device": "cpu"} if self._device_id is None else on_gpu
        kernels = {"lanczos": types.INTERP_LANCZOS3, "triangular": types.INTERP_LINEAR}
        kernel = kernels[self._filter]

        def given(name: str, dtype: Any, ndim: int = 1) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        # DALI turns each `if` into operators that split the batch. Inputs of `run` are for that
        # run: nothing may be fetched ahead.
        @pipeline_def(
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,
            enable_conditionals=True,
        )
        def graph() -> Any:
            encoded = given("encoded", types.UINT8)
            halved, resized = given("halved", types.BOOL, 0), given("resized", types.BOOL, 0)
            corner, extent = given("corner", types.INT32), given("extent", types.INT32)
            half, size = given("half", types.FLOAT), given("size", types.FLOAT)
            start, end = given("start", types.FLOAT), given("end", types.FLOAT)
            pixels = fn.decoders.image_slice(
                encoded,
                start=corner,
                shape=extent,
                axis_names="HW",
                output_type=types.RGB,
                adjust_orientation=False,
                **where,
            )
            if halved:  # linear sampling between two pixels is their mean
                pixels = fn.resize(
                    pixels,
                    roi_start=[0.0, 0.0],
                    roi_end=2 * half,
                    size=half,
                    interp_type=types.INTERP_LINEAR,
                    antialias=False,
                )
            if resized:
                pixels = fn.resize(
                    pixels,
                    roi_start=start,
                    roi_end=end,
                    size=size,
                    interp_type=kernel,
                    antialias=True,
                )
            return pixels

        return graph()


def _accept(number: int, job: DecodeJob, filter: Filter) -> _Accepted | None:
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
    left, top, right, bottom = placement.box
    scale = (right - left) / placement.width  # its shape is the result's, so one side tells
    margin = 0 if scale == 1 else _REACH * max(scale, 1.0)
    even = 1 if scale == 1 else 2  # from an even place, halves are those of the whole picture
    part = (
        max(math.floor(left - margin) // even * even, 0),
        max(math.floor(top - margin) // even * even, 0),
        min(math.ceil(right + margin), size[0]),
        min(math.ceil(bottom + margin), size[1]),
    )
    halved = filter == "lanczos" and scale >= 2  # triangular is not slower than halving
    return _Accepted(number, placement, size[0] * size[1], part, halved)
