"""All microbatches of a step, at once and before any pass starts.

A data-parallel rank owns a contiguous block of the global batch's slots. The ranks that hold one
model together (tensor and pipeline parallel) need the same numbers, so each reads, decodes and
encodes a contiguous share of what is missing and they exchange the results; every peer takes every
row from the exchange, so all hold the same bits.
Threads read and decode the next step's pictures while this one trains; encoding runs in the
caller's thread. What a step holds is a function of (seed, step) only: prefetched work that is not
asked for is thrown away, and there is no position to save.

Legend: B slots of this rank, R rows encoded together, C/H/W latent channels, height, width, T text
tokens, E text width, V pooled width. A *picture* is a sample in one orientation: 2 * sample + flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.data.decode.interface import View
from soar_mega.data.decode.model_range import to_model_range
from soar_mega.data.decode.pil import decode_one
from soar_mega.data.encoders import FrozenEncoders, sample_latents
from soar_mega.data.errors import DataError
from soar_mega.data.sampler import Sampler
from soar_mega.data.shards.index import ShardIndex
from soar_mega.parallel.collectives import all_gather_into
from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import MicroBatch, TextCondition
from soar_mega.rng import Purpose, normal, uniform


class _Rows:
    """A stack of equal rows that grows by doubling, so that a step is one index_select."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: Tensor | None = None
        self._used = 0

    def append(self, rows: Tensor) -> range:
        """Add rows; returns their numbers."""
        first, last = self._used, self._used + len(rows)
        if self._stack is None or last > len(self._stack):
            room = max(last, 2 * first)
            grown = torch.empty(room, *rows.shape[1:], dtype=rows.dtype, device=self._device)
            if self._stack is not None:
                grown[:first] = self._stack[:first]
            self._stack = grown
        self._stack[first:last] = rows
        self._used = last
        return range(first, last)

    def select(self, numbers: list[int], device: torch.device) -> Tensor:
        """Copies of some rows, on ``device``."""
        assert self._stack is not None
        chosen = torch.tensor(numbers, device=self._device)
        return self._stack.index_select(0, chosen).to(device, non_blocking=True)


_PEERS = "the other ranks of its model, to share samples"
_VALIDATION_CHUNK = 16  # pictures encoded at a time


class _Encoded:
    """Encoded pictures and captions, by picture and by caption."""

    def __init__(self, device: torch.device) -> None:
        self.posterior = _Rows(device)  # (2C, H, W): mean, then log-variance
        self.text = _Rows(device)
        self.pooled = _Rows(device)
        self.row_of_picture: dict[int, int] = {}
        self.row_of_caption: dict[str, int] = {}
        self.caption_row_of_sample: dict[int, int] = {}

    def missing(self, pictures: Sequence[int]) -> list[int]:
        """Those not here yet, each once, in order."""
        return [p for p in dict.fromkeys(pictures) if p not in self.row_of_picture]


@dataclass(frozen=True)
class _Plan:
    step: int
    slots_B: Tensor
    pictures: list[int]


class StepLoader:
    """Loads a data-parallel rank's part of any step.

    Args:
        index: The samples.
        sampler: Their order; over as many samples as ``index`` has.
        encoders: On the mesh's device.
        mesh: This process's place.
        seed: The run's seed (flips and posterior noise).
        global_batch_size: Slots a step, over all data-parallel ranks.
        micro_batch_size: Slots a microbatch.
        resolution: Side of the pictures in pixels.
        max_sequence_length: T5 tokens.
        cache_encoded: Keep every encoded picture and caption in host memory, so that later epochs
            neither read nor encode. The posterior is still sampled anew each time.
        random_flip: Mirror each slot's picture with probability 1/2.
        num_decode_threads: Threads that read and decode ahead; 0 does it in ``load``.

    Raises:
        ValueError: The batch sizes do not divide, or the VAE does not fit the resolution.
    """

    def __init__(
        self,
        index: ShardIndex,
        sampler: Sampler,
        encoders: FrozenEncoders,
        mesh: Mesh,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        resolution: int,
        max_sequence_length: int,
        cache_encoded: bool = False,
        random_flip: bool = False,
        num_decode_threads: int = 2,
    ) -> None:
        if global_batch_size % (mesh.data_size * micro_batch_size):
            raise ValueError(
                f"train.global_batch_size={global_batch_size}: must be a multiple of "
                f"train.micro_batch_size {micro_batch_size} times the {mesh.data_size} "
                f"data-parallel ranks ({mesh.data_size * micro_batch_size}). Change one of them."
            )
        if sampler.num_samples != len(index):
            raise ValueError(f"a sampler over {sampler.num_samples} for {len(index)} samples")
        self._index, self._sampler, self._encoders, self._mesh = index, sampler, encoders, mesh
        self._seed, self._resolution, self._text_length = seed, resolution, max_sequence_length
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._random_flip = random_flip
        channels, *cells = encoders.latent_shape(resolution)
        self._posterior_shape = (2 * channels, *cells)
        self._cache = _Encoded(torch.device("cpu")) if cache_encoded else None
        self._pool = ThreadPoolExecutor(num_decode_threads) if num_decode_threads else None
        self._pending: dict[tuple[int, bool], Future[tuple[Tensor | None, str]]] = {}
        self._next_plan: _Plan | None = None
        own = encoders.encode_prompts([""], max_sequence_length)
        self.empty = TextCondition(
            self._exchange(own.text_BTE, 1, own.text_BTE[0]),
            self._exchange(own.pooled_BV, 1, own.pooled_BV[0]),
        )

    def load(self, step: int) -> list[MicroBatch]:
        """The microbatches of this rank's slots of ``step``, in slot order, on the mesh's device.

        A collective over the ranks of one model: all call it for the same steps.

        Raises:
            DataError: A sample cannot be read or decoded (on this rank or another of its model).
        """
        plan = self._next_plan
        if plan is None or plan.step != step:
            plan = self._plan(step)
        encoded = _Encoded(self._mesh.device) if self._cache is None else self._cache
        self._fill(encoded, plan)
        self._prefetch(self._plan(step + 1))

        rows = [encoded.row_of_picture[picture] for picture in plan.pictures]
        text_rows = [encoded.caption_row_of_sample[picture // 2] for picture in plan.pictures]
        device = self._mesh.device
        mean_BCHW, logvar_BCHW = encoded.posterior.select(rows, device).chunk(2, dim=1)
        noise_BN = normal(
            self._seed,
            Purpose.VAE_POSTERIOR,
            step,
            plan.slots_B,
            mean_BCHW[0].numel(),
            device=device,
        )
        raw_BCHW = sample_latents(mean_BCHW, logvar_BCHW, noise_BN.view(mean_BCHW.shape))
        clean_BCHW = self._encoders.normalise(raw_BCHW)
        text_BTE = encoded.text.select(text_rows, device)
        pooled_BV = encoded.pooled.select(text_rows, device)
        weight_B = torch.ones(len(rows), device=device)
        parts = [
            slice(start, start + self._micro_batch_size)
            for start in range(0, len(rows), self._micro_batch_size)
        ]
        return [
            MicroBatch(
                step=step,
                slots_B=plan.slots_B[part],
                clean_BCHW=clean_BCHW[part],
                prompt=TextCondition(text_BTE[part], pooled_BV[part]),
                empty=self.empty,
                weight_B=weight_B[part],
            )
            for part in parts
        ]

    def close(self) -> None:
        """Stop the threads; what they read ahead is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _plan(self, step: int) -> _Plan:
        share = self._global_batch_size // self._mesh.data_size
        first = self._mesh.data_rank * share
        start = step * self._global_batch_size + first
        _, samples_B = self._sampler.positions(start, start + share)
        slots_B = torch.arange(first, first + share)
        pictures_B = samples_B * 2
        if self._random_flip:
            draws_B1 = uniform(self._seed, Purpose.FLIP, step, slots_B, 1)
            pictures_B += (draws_B1[:, 0] < 0.5).long()
        return _Plan(step, slots_B, pictures_B.tolist())

    def _share(self, count: int) -> slice:
        """This rank's contiguous share of ``count`` rows; the last ones may be shorter."""
        size = -(-count // self._mesh.model_size)
        return slice(self._mesh.model_rank * size, (self._mesh.model_rank + 1) * size)

    def _jobs(self, missing: list[int]) -> list[tuple[int, bool]]:
        """(picture, pixels wanted): own share in full, of the rest the captions only, which tell
        every peer which captions there are to share out."""
        own = set(missing[self._share(len(missing))])
        return [(picture, picture in own) for picture in missing]

    def _fetch(self, job: tuple[int, bool]) -> tuple[Tensor | None, str]:
        picture, wants_pixels = job
        sample, flip = divmod(picture, 2)
        caption = self._index.read_caption(sample)
        if not wants_pixels:
            return None, caption
        data, where = self._index.read_image(sample), self._index.where(sample)
        view = View(self._resolution, self._resolution, flip=bool(flip))
        return torch.from_numpy(decode_one(data, view, where)), caption

    def _prefetch(self, plan: _Plan) -> None:
        self._next_plan = plan
        if self._pool is None:
            return
        pictures = plan.pictures if self._cache is None else self._cache.missing(plan.pictures)
        # Not cached: each step encodes all of its own pictures, so nothing is here already.
        for job in self._jobs(list(dict.fromkeys(pictures))):
            self._pending[job] = self._pool.submit(self._fetch, job)

    def _fetch_all(self, jobs: list[tuple[int, bool]]) -> list[tuple[Tensor | None, str]]:
        if self._pool is None:
            return [self._fetch(job) for job in jobs]
        ahead, self._pending = self._pending, {}
        futures = [
            ahead.pop(job) if job in ahead else self._pool.submit(self._fetch, job) for job in jobs
        ]
        for stale in ahead.values():
            stale.cancel()
        return [future.result() for future in futures]

    def _fill(self, encoded: _Encoded, plan: _Plan) -> None:
        """Read, encode and exchange what ``plan`` needs and ``encoded`` lacks."""
        missing = encoded.missing(plan.pictures)
        if not missing:
            return
        failure: DataError | None = None
        fetched: list[tuple[Tensor | None, str]] = []
        try:
            fetched = self._fetch_all(self._jobs(missing))
        except DataError as error:
            failure = error
        self._agree(failure, plan.step)

        pixels = [picture for picture, _ in fetched if picture is not None]
        if pixels:
            pixels_R3HW = to_model_range(torch.stack(pixels))
            own_RCHW = torch.cat(self._encoders.encode_images(pixels_R3HW), dim=1)
        else:
            own_RCHW = torch.empty(0, *self._posterior_shape, device=self._mesh.device)
        all_RCHW = self._exchange(own_RCHW, len(missing), own_RCHW.new_empty(self._posterior_shape))

        captions = dict.fromkeys(caption for _, caption in fetched)
        fresh = [caption for caption in captions if caption not in encoded.row_of_caption]
        if fresh:
            own = fresh[self._share(len(fresh))]
            text_RTE, pooled_RV = self.empty.text_BTE[:0], self.empty.pooled_BV[:0]
            if own:
                condition = self._encoders.encode_prompts(own, self._text_length)
                text_RTE, pooled_RV = condition.text_BTE, condition.pooled_BV
            text_RTE = self._exchange(text_RTE, len(fresh), self.empty.text_BTE[0])
            pooled_RV = self._exchange(pooled_RV, len(fresh), self.empty.pooled_BV[0])
            rows = encoded.text.append(text_RTE)
            encoded.pooled.append(pooled_RV)
            encoded.row_of_caption.update(zip(fresh, rows, strict=True))

        for picture, (_, caption) in zip(missing, fetched, strict=True):
            encoded.caption_row_of_sample[picture // 2] = encoded.row_of_caption[caption]
        encoded.row_of_picture.update(zip(missing, encoded.posterior.append(all_RCHW), strict=True))

    def _agree(self, failure: DataError | None, step: int) -> None:
        """Raise on all ranks of a model if one of them failed: the others would wait for its
        rows forever."""
        if self._mesh.model_group is None:
            if failure is not None:
                raise failure
            return
        device = self._mesh.device
        own_1 = torch.tensor([failure is not None], dtype=torch.uint8, device=device)
        all_P = torch.empty(self._mesh.model_size, dtype=torch.uint8, device=device)
        with waiting_for(_PEERS):
            all_gather_into(all_P, own_1, group=self._mesh.model_group)
        if failure is not None:
            raise failure
        failed = all_P.nonzero().flatten().tolist()
        if failed:
            raise DataError(
                f"step {step}: model-parallel rank {failed[0]} of data-parallel rank "
                f"{self._mesh.data_rank} could not read its share of the batch; see its message."
            )

    def _exchange(self, own_R: Tensor, total: int, like: Tensor) -> Tensor:
        """All ``total`` rows from every peer's share, in order. ``like`` is like a row.

        Sent as bytes: no backend then needs to know the type, and no bit changes.
        """
        if self._mesh.model_group is None:
            return own_R
        size = -(-total // self._mesh.model_size)
        part_R = like.new_zeros(size, *like.shape)
        part_R[: len(own_R)] = own_R
        all_R = like.new_empty(size * self._mesh.model_size, *like.shape)
        with waiting_for(_PEERS):
            all_gather_into(
                all_R.view(-1).view(torch.uint8),
                part_R.view(-1).view(torch.uint8),
                group=self._mesh.model_group,
            )
        return all_R[:total]


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
    for some in torch.arange(num_samples).split(_VALIDATION_CHUNK):  # bounds the memory
        pixels = [
            torch.from_numpy(decode_one(index.read_image(n), view, index.where(n)))
            for n in some.tolist()
        ]
        means.append(encoders.encode_images(to_model_range(torch.stack(pixels)))[0])
    captions = [index.read_caption(sample) for sample in range(num_samples)]
    latents_BCHW = encoders.normalise(torch.cat(means))
    return latents_BCHW, encoders.encode_prompts(captions, max_sequence_length)
