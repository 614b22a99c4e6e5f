"""Rows of encoded sets.

The ranks that hold one model together read a share of the step's payloads each and exchange the
bytes. A thread reads coming steps into (pinned) buffers while this one trains.

Legend: B slots of this rank, N bytes of the longest payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from soar_mega.data.buckets import Bucket
from soar_mega.data.encoded.read import EncodedSet
from soar_mega.data.errors import BadSampleError
from soar_mega.data.peers import exchange, own_share
from soar_mega.data.plan import Picture, StepPlan
from soar_mega.data.rows import Rows
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import TextCondition


@dataclass(frozen=True)
class _Read:
    """This rank's share of a step: payloads, and what is wrong with them."""

    rows_BN: Tensor
    errors: list[BadSampleError | None]


class EncodedRows:
    """Rows of an encoded set.

    Args:
        encoded: The set.
        mesh: This process's place.
        micro_batch_size: Slots a microbatch.
        dtype: Of the text.
        ahead: Whether coming steps are read in a thread.
        on_bad: Told of each bad sample of this rank's share, when its step comes.
    """

    def __init__(
        self,
        encoded: EncodedSet,
        mesh: Mesh,
        *,
        micro_batch_size: int,
        dtype: torch.dtype,
        ahead: bool = True,
        on_bad: Callable[[StepPlan, Picture, BadSampleError], None] = lambda *_: None,
    ) -> None:
        self._set, self._mesh, self._dtype = encoded, mesh, dtype
        self._micro_batch_size, self._on_bad = micro_batch_size, on_bad
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._reading: dict[int, Future[_Read]] = {}
        self.empty = TextCondition(
            encoded.empty.text_BTE.to(mesh.device, dtype),
            encoded.empty.pooled_BV.to(mesh.device, dtype),
        )

    def prefetch(self, plan: StepPlan) -> None:
        if self._pool is not None:
            self._reading[plan.step] = self._pool.submit(self._read, plan)

    def rows(self, plan: StepPlan) -> list[Rows]:
        reading = self._reading.pop(plan.step, None)
        found = self._read(plan) if reading is None else reading.result()
        device, count = self._mesh.device, len(plan.pictures)
        own = plan.pictures[own_share(count, self._mesh)]
        own_BN, errors = found.rows_BN.to(device, non_blocking=True), found.errors
        if device.type != "cpu":
            errors = self._checked(own, own_BN, errors)
        for picture, error in zip(own, errors, strict=True):
            if error is not None:
                self._on_bad(plan, picture, error)
        codes = [0 if error is None else error.code for error in errors]
        own_B = torch.tensor(codes, dtype=torch.uint8, device=device)
        bad_B = exchange(own_B, count, self._mesh).cpu()
        rows_BN = exchange(own_BN, count, self._mesh)
        size = self._micro_batch_size
        return [
            self._microbatch(
                rows_BN[start : start + size],
                _bucket(plan.pictures[start]),
                bad_B[start : start + size],
            )
            for start in range(0, count, size)
        ]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()
        self._set.close()

    def _microbatch(self, rows_BN: Tensor, bucket: Bucket, bad_B: Tensor) -> Rows:
        own_BN = rows_BN[:, : self._set.payload_size(bucket)].contiguous()
        batch = self._set.unpack(own_BN, bucket, self._dtype)
        return Rows(batch.mean_BCHW, batch.logvar_BCHW, batch.text, bad_B)

    def _read(self, plan: StepPlan) -> _Read:
        longest = max(self._set.payload_size(_bucket(picture)) for picture in plan.pictures)
        own = plan.pictures[own_share(len(plan.pictures), self._mesh)]
        pinned = self._mesh.device.type == "cuda"
        rows_BN = torch.empty(len(own), longest, dtype=torch.uint8, pin_memory=pinned)
        errors: list[BadSampleError | None] = []
        for samples, part_BN in self._groups(own, rows_BN):
            errors += self._set.read(samples, part_BN)
        if not pinned:  # else the GPU does it, in ``rows``
            errors = self._checked(own, rows_BN, errors)
        return _Read(rows_BN, errors)

    def _groups(
        self, pictures: Sequence[Picture], rows_BN: Tensor
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Samples of one size that follow each other, and their rows without what fills them up."""
        first = 0
        for bucket, group in groupby(pictures, key=_bucket):
            samples = [picture.sample for picture in group]
            rows = rows_BN[first : first + len(samples)]
            yield samples, rows[:, : self._set.payload_size(bucket)]
            first += len(samples)

    def _checked(
        self,
        pictures: Sequence[Picture],
        rows_BN: Tensor,
        errors: Sequence[BadSampleError | None],
    ) -> list[BadSampleError | None]:
        """``errors``, and where there was none what else is wrong."""
        found: list[BadSampleError | None] = []
        for samples, part_BN in self._groups(pictures, rows_BN):
            found += self._set.check_finite(samples, part_BN)
        return [before or after for before, after in zip(errors, found, strict=True)]


def _bucket(picture: Picture) -> Bucket:
    return Bucket(picture.view.width, picture.view.height)
