"""Reads encoded sets for training.

A payload goes straight from its tar into its row of a batch buffer, which the caller keeps (pinned
where a GPU takes it) and hands to ``unpack`` as a whole: one copy to the device, and CLIP's part is
filled up there.

Legend: B samples, N bytes of a payload, T text tokens, E text width, V pooled width.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from soar_mega.data.buckets import Bucket
from soar_mega.data.encoded.fingerprint import encoder_fingerprint
from soar_mega.data.encoded.format import (
    DESCRIPTOR,
    EMPTY,
    Descriptor,
    EncodedBatch,
)
from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.files import ShardFiles
from soar_mega.data.shards.index import ShardIndex
from soar_mega.data.shards.shard import DATA_OFFSET, DATA_SIZE
from soar_mega.passes import TextCondition

DAMAGED = "damaged payload"
_TOOL = "tools/encode_data.py"


class EncodedSet:
    """The samples of encoded shards, of one or several folders made alike.

    Attributes:
        descriptor: Of the first folder; the others agree in fingerprint and payload.
        buckets: Sizes in pixels of the pictures that were encoded.
        buckets_N: int64, each sample's place in ``buckets``.
        empty: Condition of the empty prompt, bf16 on the CPU, with B = 1.
    """

    def __init__(
        self,
        index: ShardIndex,
        descriptor: Descriptor,
        buckets_N: np.ndarray,
        empty: TextCondition,
        num_threads: int,
    ) -> None:
        self._index, self._num_threads = index, num_threads
        self._pool = ThreadPoolExecutor(num_threads)
        self.descriptor, self.buckets_N, self.empty = descriptor, buckets_N, empty
        self.buckets = descriptor.preprocessing.buckets

    @staticmethod
    def open(
        index: ShardIndex, *, setting: str = "data.shards", num_threads: int = 4
    ) -> EncodedSet:
        """Find and check what belongs to the shards of ``index``.

        Args:
            index: Of encoded shards.
            setting: The config key to name in errors.
            num_threads: That read payloads.

        Raises:
            DataError: A folder has no descriptor or no empty prompt, or they are damaged; folders
                that do not agree; an index that does not fit its descriptor.
        """
        lead = f"{setting}: "
        folders = list(dict.fromkeys(posixpath.dirname(shard.path) for shard in index.shards))
        found = {folder: _descriptor(index.files, folder, lead) for folder in folders}
        empties = {folder: _empty(index.files, folder, one, lead) for folder, one in found.items()}
        first, descriptor = next(iter(found.items()))
        for folder, other in found.items():
            if other.fingerprint != descriptor.fingerprint or other.payload != descriptor.payload:
                raise DataError(
                    f"{lead}the sets {first!r} and {folder!r} were not made alike: they differ in "
                    f"{_difference(descriptor, other)}. Encode one of them again with {_TOOL}."
                )
        sizes_N2, buckets_N = index.sizes(), np.full(len(index), -1, dtype=np.int64)
        for place, bucket in enumerate(descriptor.preprocessing.buckets):
            buckets_N[(sizes_N2 == list(bucket)).all(axis=1)] = place
        if (buckets_N < 0).any():
            sample = int(np.argmax(buckets_N < 0))
            raise DataError(
                f"{lead}{index.where(sample)}: its index gives it a size that is none of the set's "
                f"buckets. Encode the set again with {_TOOL}."
            )
        return EncodedSet(index, descriptor, buckets_N, empties[first], num_threads)

    def check(
        self,
        pretrained: str | Path,
        *,
        resolution: int,
        max_sequence_length: int,
        buckets: tuple[Bucket, ...],
        setting: str = "data.shards",
    ) -> None:
        """Refuse a training that the set was not made for.

        Raises:
            DataError: Another encoder, tokenizer or setting; names both sides and the fix.
            FolderError: The model folder cannot be used.
        """
        made = self.descriptor
        found = encoder_fingerprint(pretrained)
        parts = sorted(found.keys() | made.components.keys())
        other = [part for part in parts if found.get(part) != made.components.get(part)]
        fix = f"or encode the pictures again with {_TOOL}."
        if other:
            sides = ", ".join(
                f"{part} {_short(found.get(part))} against {_short(made.components.get(part))}"
                for part in other
            )
            raise DataError(
                f"model.pretrained={str(pretrained)!r} is not what {setting} were encoded with "
                f"({made.pretrained!r}): other {', '.join(other)} (fingerprints: {sides}). Train "
                f"with a folder that has the same, {fix}"
            )
        before = made.preprocessing
        for name, wanted, given in (
            ("data.resolution", resolution, before.resolution),
            ("data.max_sequence_length", max_sequence_length, before.max_sequence_length),
        ):
            if wanted != given:
                raise DataError(
                    f"{name}={wanted}: {setting} were encoded with {given}. Set it to {given}, "
                    f"{fix}"
                )
        if buckets != before.buckets:
            raise DataError(
                f"data.max_aspect_ratio: gives {len(buckets)} picture sizes, but {setting} were "
                f"encoded with {len(before.buckets)} others. Set it as --max-aspect-ratio was, "
                f"{fix}"
            )

    def payload_size(self, bucket: Bucket) -> int:
        """Bytes of a payload."""
        return self.descriptor.payload.size(bucket)

    def new_rows(self, bucket: Bucket, count: int, *, pinned: bool = False) -> Tensor:
        """A batch buffer, uint8 (count, N), for payloads of a bucket."""
        return torch.empty(count, self.payload_size(bucket), dtype=torch.uint8, pin_memory=pinned)

    def read(self, samples: Sequence[int], rows_BN: Tensor) -> list[BadSampleError | None]:
        """Read payloads into the rows of a batch buffer; any thread may call it.

        Args:
            samples: All of one bucket.
            rows_BN: From ``new_rows`` for that bucket, or rows of it; a bad sample's become zero.

        Returns:
            What is wrong with each sample, None where nothing is.
        """
        array_BN = rows_BN.numpy()
        size = -(-len(samples) // self._num_threads)
        parts = [slice(start, start + size) for start in range(0, len(samples), max(size, 1))]

        def read_part(part: slice) -> list[BadSampleError | None]:
            return [
                self._read(sample, row_N)
                for sample, row_N in zip(samples[part], array_BN[part], strict=True)
            ]

        # The caller's own cache is warm, and waiting for a thread is not free.
        each = map if len(parts) == 1 else self._pool.map
        return [error for errors in each(read_part, parts) for error in errors]

    def _read(self, sample: int, row_N: np.ndarray) -> BadSampleError | None:
        shard, row = self._index.locate(sample)
        offset, size = int(shard.table[row, DATA_OFFSET]), int(shard.table[row, DATA_SIZE])
        try:
            if size != len(row_N):
                words = f"a payload of {size} bytes, {len(row_N)} expected."
                raise BadSampleError(DAMAGED, f"{shard.where(row)}: {words}")
            self._index.files.read_into(shard.path, offset, row_N.data)
        except BadSampleError as error:
            row_N[:] = 0
            return BadSampleError(error.kind, str(error))
        return None

    def check_finite(self, samples: Sequence[int], rows_BN: Tensor) -> list[BadSampleError | None]:
        """Look for NaN and infinity; such rows become zero, for zero times NaN would be NaN.

        Apart from ``read``, so that a GPU can do it on its copy: 83 of 336 us a sample were this on
        a CPU.

        Args:
            samples: As for ``read``.
            rows_BN: As ``read`` filled it, or a copy of that on another device.

        Returns:
            What is wrong with each sample, None where nothing is.
        """
        if rows_BN.device.type == "cpu":
            finite_B = [_finite(row_N) for row_N in rows_BN.numpy()]
        else:
            bits_BN = rows_BN.view(torch.int16)
            finite_B = ((bits_BN & 0x7F80) != 0x7F80).all(dim=1).tolist()
        errors: list[BadSampleError | None] = []
        for sample, row_N, finite in zip(samples, rows_BN, finite_B, strict=True):
            words = f"{self._index.where(sample)}: the payload has NaN or infinity."
            errors.append(None if finite else BadSampleError(DAMAGED, words))
            if not finite:
                row_N.zero_()
        return errors

    def unpack(self, rows_BN: Tensor, bucket: Bucket, dtype: torch.dtype) -> EncodedBatch:
        """The samples of a batch buffer, on its device; nothing refers to the buffer afterwards.

        Args:
            rows_BN: As ``read`` filled it, or a copy of that on another device.
            bucket: The samples'.
            dtype: Of the text.
        """
        return self.descriptor.payload.unpack(rows_BN, bucket, dtype)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _finite(row_N: np.ndarray) -> bool:
    """Whether no bf16 number has all bits of its exponent set: two passes without a copy."""
    return bool(row_N.view("<i2").max() < 0x7F80 and row_N.view("<u2").max() < 0xFF80)


def _descriptor(files: ShardFiles, folder: str, lead: str) -> Descriptor:
    path = posixpath.join(folder, DESCRIPTOR)
    try:
        data = _whole(files, path)
    except DataError as error:
        raise DataError(
            f"{lead}{path}: cannot be read ({error}). The set is not finished, or not copied as a "
            f"whole: give the same {_TOOL} command once more, or copy it."
        ) from error
    try:
        return Descriptor.from_json(data)
    except ValueError as error:
        raise DataError(f"{lead}{path}: {error}. Encode the set again with {_TOOL}.") from error


def _whole(files: ShardFiles, path: str) -> bytes:
    data = files.read_small(path)
    if data is None:
        raise DataError("there is no such file")
    return data


def _empty(files: ShardFiles, folder: str, descriptor: Descriptor, lead: str) -> TextCondition:
    """The empty prompt's embeddings of a folder: dropout and rollouts need them."""
    path = posixpath.join(folder, EMPTY)
    fix = f"Copy it from the set, or give the same {_TOOL} command once more."
    try:
        tensors = safetensors.torch.load(_whole(files, path))
    except (DataError, safetensors.SafetensorError) as error:
        raise DataError(
            f"{lead}{path}: the empty prompt's embeddings cannot be read ({error}). {fix}"
        ) from error
    payload = descriptor.payload
    wanted = {
        "text": (payload.clip_tokens + payload.t5_tokens, payload.text_width),
        "pooled": (payload.pooled_width,),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != wanted or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise DataError(f"{lead}{path}: damaged: {shapes}, expected finite {wanted}. {fix}")
    return TextCondition(tensors["text"][None], tensors["pooled"][None])


def _difference(one: Descriptor, other: Descriptor) -> str:
    parts = sorted(one.components.keys() | other.components.keys())
    names = [part for part in parts if one.components.get(part) != other.components.get(part)]
    before, after = vars(one.preprocessing), vars(other.preprocessing)
    names += [name for name in before if before[name] != after[name]]
    return ", ".join(names) or "the payload's shapes"


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:8]
