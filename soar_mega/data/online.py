"""Pictures and captions read, decoded and encoded while training.

The ranks that hold one model together need the same rows, so each reads, decodes and encodes a
share of what is missing and they exchange the results. A thread reads and decodes coming steps
while this one trains; encoding runs in the caller's thread. A sample that cannot be used is bad on
all peers, whoever of them noticed.

Legend: B slots of this rank, M missing pictures, R rows encoded together, C/H/W latent channels,
height, width, T text tokens, E text width, V pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from soar_mega.data.decode.handover import stack_pixels
from soar_mega.data.decode.interface import Decoder, Pixels
from soar_mega.data.decode.model_range import to_model_range
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.peers import exchange, highest, own_share
from soar_mega.data.pictures import Fetched, PictureReader
from soar_mega.data.plan import Picture, StepPlan
from soar_mega.data.rows import Rows
from soar_mega.data.shards.index import ShardIndex
from soar_mega.data.stack import RowStack
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import TextCondition

FATAL = 255  # a code beside those of bad samples: this rank cannot go on
# Two, so that one step's reading overlaps another's decoding.
_STEPS_AT_ONCE = 2


class _Encoded:
    """Encoded pictures and captions. Text row 0 is the empty prompt's."""

    def __init__(self, device: torch.device, empty: TextCondition) -> None:
        self.device = device
        self.posteriors: dict[tuple[int, ...], RowStack] = {}  # by shape: mean, then log-variance
        self.text, self.pooled = RowStack(device), RowStack(device)
        self.text.append(empty.text_BTE)
        self.pooled.append(empty.pooled_BV)
        self.row_of_picture: dict[Picture, int] = {}
        self.row_of_caption: dict[str, int] = {"": 0}
        self.caption_row: dict[Picture, int] = {}
        self.codes: dict[Picture, int] = {}


class OnlineRows:
    """Rows of raw shards.

    Args:
        index: The samples.
        encoders: On the mesh's device.
        mesh: This process's place.
        decoder: Of pictures.
        micro_batch_size: Slots a microbatch.
        max_sequence_length: T5 tokens.
        cache: Keep every encoded picture and caption in host memory, so that later epochs neither
            read nor encode; not the bad ones. The posterior is still sampled anew each time.
        num_workers: Threads that read; 0: nothing is read ahead.
        on_bad: Told of each bad sample of this rank's share, when its step comes.
    """

    def __init__(
        self,
        index: ShardIndex,
        encoders: FrozenEncoders,
        mesh: Mesh,
        decoder: Decoder,
        *,
        micro_batch_size: int,
        max_sequence_length: int,
        cache: bool = False,
        num_workers: int = 2,
        on_bad: Callable[[StepPlan, Picture, BadSampleError], None] = lambda *_: None,
    ) -> None:
        self._index, self._encoders, self._mesh = index, encoders, mesh
        self._reader = PictureReader(index, decoder, num_workers)
        self._micro_batch_size, self._text_length = micro_batch_size, max_sequence_length
        self._on_bad = on_bad
        self._ahead = ThreadPoolExecutor(_STEPS_AT_ONCE) if num_workers else None
        self._missing: dict[int, list[Picture]] = {}
        self._fetched: dict[int, Future[Fetched]] = {}
        self._known: set[Picture] | None = set() if cache else None
        own = encoders.encode_prompts([""], max_sequence_length)
        one = slice(1 if mesh.model_rank == 0 else 0)  # its owner's bits for all
        self.empty = TextCondition(
            exchange(own.text_BTE[one], 1, mesh), exchange(own.pooled_BV[one], 1, mesh)
        )
        self._cache = _Encoded(torch.device("cpu"), self.empty) if cache else None

    def prefetch(self, plan: StepPlan) -> None:
        missing = list(dict.fromkeys(plan.pictures))
        if self._known is not None:
            missing = [picture for picture in missing if picture not in self._known]
            self._known.update(missing)
        self._missing[plan.step] = missing
        if self._ahead is not None:
            self._fetched[plan.step] = self._ahead.submit(self._fetch, missing)

    def rows(self, plan: StepPlan) -> list[Rows]:
        encoded = self._cache or _Encoded(self._mesh.device, self.empty)
        self._fill(encoded, plan)
        size = self._micro_batch_size
        return [
            self._microbatch(encoded, plan.pictures[start : start + size])
            for start in range(0, len(plan.pictures), size)
        ]

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.shutdown(wait=True, cancel_futures=True)
        self._fetched.clear()
        self._reader.close()

    def _microbatch(self, encoded: _Encoded, pictures: Sequence[Picture]) -> Rows:
        device = self._mesh.device
        stack = encoded.posteriors[self._posterior_shape(pictures[0])]
        posterior = stack.select([encoded.row_of_picture[p] for p in pictures], device)
        mean_BCHW, logvar_BCHW = posterior.chunk(2, dim=1)
        rows = [encoded.caption_row[picture] for picture in pictures]
        prompt = TextCondition(
            encoded.text.select(rows, device), encoded.pooled.select(rows, device)
        )
        bad_B = torch.tensor([encoded.codes[picture] for picture in pictures], dtype=torch.uint8)
        return Rows(mean_BCHW, logvar_BCHW, prompt, bad_B)

    def _posterior_shape(self, picture: Picture) -> tuple[int, int, int]:
        factor, view = self._encoders.downsampling, picture.view
        channels = self._encoders.latent_channels
        return 2 * channels, view.height // factor, view.width // factor

    def _fetch(self, missing: Sequence[Picture]) -> Fetched:
        return self._reader.fetch(missing, own_share(len(missing), self._mesh))

    def _fill(self, encoded: _Encoded, plan: StepPlan) -> None:
        """Read, encode and exchange what ``plan`` needs and ``encoded`` lacks."""
        missing = self._missing.pop(plan.step)
        ahead = self._fetched.pop(plan.step, None)
        if not missing:
            return
        fatal: DataError | None = None
        fetched = Fetched({}, {}, {})
        try:
            fetched = self._fetch(missing) if ahead is None else ahead.result()
        except DataError as error:
            fatal = error
        codes = self._agree(missing, fetched, fatal, plan)
        if self._known is not None:  # a bad sample is read again: its shard may be back by then
            self._known.difference_update(picture for picture in missing if codes[picture])
        good = [picture for picture in missing if codes[picture] == 0]
        self._encode_pictures(encoded, missing, good, fetched.pixels)
        self._encode_captions(encoded, good, fetched.captions)
        encoded.codes.update(codes)
        for picture in missing:
            caption = fetched.captions[picture] if codes[picture] == 0 else ""
            encoded.caption_row[picture] = encoded.row_of_caption[caption]

    def _agree(
        self,
        missing: Sequence[Picture],
        fetched: Fetched,
        fatal: DataError | None,
        plan: StepPlan,
    ) -> dict[Picture, int]:
        """The code of each missing picture, the same on all peers.

        Raises:
            DataError: On all of them, where one cannot go on.
        """
        own_M = [fetched.errors[p].code if p in fetched.errors else 0 for p in missing]
        if fatal is not None:
            own_M = [FATAL] * len(missing)
        device = self._mesh.device
        agreed_M = highest(torch.tensor(own_M, dtype=torch.uint8, device=device), self._mesh)
        if fatal is not None:
            raise fatal
        codes = dict(zip(missing, agreed_M.tolist(), strict=True))
        if FATAL in codes.values():
            raise DataError(
                f"step {plan.step}: another rank of the model of data-parallel rank "
                f"{self._mesh.data_rank} could not read its share of the batch; see its message."
            )
        for picture in missing[own_share(len(missing), self._mesh)]:
            if codes[picture]:
                elsewhere = BadSampleError(
                    "unreadable",
                    f"{self._index.where(picture.sample)}: another rank could not read its caption",
                )
                self._on_bad(plan, picture, fetched.errors.get(picture, elsewhere))
        return codes

    def _encode_pictures(
        self,
        encoded: _Encoded,
        missing: Sequence[Picture],
        good: Sequence[Picture],
        pixels: dict[Picture, Pixels],
    ) -> None:
        """Posteriors of ``missing``; zeros for those that are not ``good``."""
        device = self._mesh.device
        own = missing[own_share(len(missing), self._mesh)]
        longest = max(int(np.prod(self._posterior_shape(picture))) for picture in missing)
        # Flat rows: sizes differ, and a peer must not wait for each of them.
        own_RX = torch.zeros(len(own), longest, device=device)
        sizes: dict[tuple[int, ...], list[int]] = {}
        for row, picture in enumerate(own):
            if picture in pixels:
                sizes.setdefault(tuple(pixels[picture].shape), []).append(row)
        for rows in sizes.values():
            batch = stack_pixels([pixels[own[row]] for row in rows], device)
            encoding = self._encoders.encode_images(to_model_range(batch))
            flat = torch.cat(encoding, dim=1).flatten(1)
            own_RX[torch.tensor(rows, device=device), : flat.shape[1]] = flat
        all_MX = exchange(own_RX, len(missing), self._mesh)
        usable = set(good)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for row, picture in enumerate(missing):
            if picture not in usable:
                all_MX[row] = 0
            shapes.setdefault(self._posterior_shape(picture), []).append(row)
        for shape, rows in shapes.items():
            stack = encoded.posteriors.setdefault(shape, RowStack(encoded.device))
            chosen = all_MX[torch.tensor(rows, device=device), : int(np.prod(shape))]
            numbers = stack.append(chosen.view(-1, *shape))
            encoded.row_of_picture.update(zip([missing[row] for row in rows], numbers, strict=True))

    def _encode_captions(
        self, encoded: _Encoded, good: Sequence[Picture], captions: dict[Picture, str]
    ) -> None:
        wanted = dict.fromkeys(captions[picture] for picture in good)
        fresh = [caption for caption in wanted if caption not in encoded.row_of_caption]
        if not fresh:
            return
        own = fresh[own_share(len(fresh), self._mesh)]
        text_RTE, pooled_RV = self.empty.text_BTE[:0], self.empty.pooled_BV[:0]
        if own:
            condition = self._encoders.encode_prompts(own, self._text_length)
            text_RTE, pooled_RV = condition.text_BTE, condition.pooled_BV
        rows = encoded.text.append(exchange(text_RTE, len(fresh), self._mesh))
        encoded.pooled.append(exchange(pooled_RV, len(fresh), self._mesh))
        encoded.row_of_caption.update(zip(fresh, rows, strict=True))
