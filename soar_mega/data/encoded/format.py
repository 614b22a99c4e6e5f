"""What an encoded set consists of.

A folder of shards. Each is a tar with ``KEY.bin``, the payload, and ``KEY.txt``, the caption, of
every sample, and has an index file beside it. ``encoded.json`` (``Descriptor``) says what the
payloads hold and of which encoders; it is written last, so a folder without it is not finished.
``empty.safetensors`` holds the empty prompt's embeddings.

Legend: B samples, N bytes of a payload, C/H/W latent channels, height, width, T text tokens, E text
width, V pooled width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soar_mega.data.buckets import Bucket
from soar_mega.data.model_folder import ModelFacts
from soar_mega.passes import TextCondition

FORMAT_VERSION = 1
DESCRIPTOR = "encoded.json"
EMPTY = "empty.safetensors"
_ITEM = torch.bfloat16.itemsize


class EncodedBatch(NamedTuple):
    """Samples as ``FrozenEncoders`` gives them.

    Attributes:
        mean_BCHW: Of the VAE's posterior, raw, fp32.
        logvar_BCHW: Its log-variance, fp32.
        text: Embeddings, CLIP's filled up with zeros to the width of T5's.
    """

    mean_BCHW: Tensor
    logvar_BCHW: Tensor
    text: TextCondition


@dataclass(frozen=True)
class PayloadLayout:
    """A payload is bf16 numbers, little endian, without gaps: posterior (mean, then log-variance),
    hidden states of both CLIPs side by side, T5's hidden states, pooled.

    Attributes:
        latent_channels: Of the VAE's latents.
        downsampling: Pixels a latent cell is wide and high.
        clip_tokens: Tokens of each CLIP.
        clip_width: Width of both CLIPs' hidden states together.
        t5_tokens: T5's tokens (``max_sequence_length``).
        text_width: Width of T5's hidden states, and of the text at training.
        pooled_width: Width of both CLIPs' pooled outputs together.
        has_t5: Without, payloads have no T5 part, and at training zeros stand for it.
    """

    latent_channels: int
    downsampling: int
    clip_tokens: int
    clip_width: int
    t5_tokens: int
    text_width: int
    pooled_width: int
    has_t5: bool

    @staticmethod
    def of(facts: ModelFacts, max_sequence_length: int) -> PayloadLayout:
        """The layout that a model's encoders give."""
        names = {field.name for field in dataclasses.fields(PayloadLayout)} - {"t5_tokens"}
        same = {name: getattr(facts, name) for name in names}
        return PayloadLayout(t5_tokens=max_sequence_length, **same)

    def shapes(self, bucket: Bucket) -> dict[str, tuple[int, ...]]:
        """The parts of a payload, in order, and their shapes."""
        height, width = bucket.height // self.downsampling, bucket.width // self.downsampling
        return {
            "posterior": (2 * self.latent_channels, height, width),
            "clip": (self.clip_tokens, self.clip_width),
            "t5": (self.t5_tokens if self.has_t5 else 0, self.text_width),
            "pooled": (self.pooled_width,),
        }

    def size(self, bucket: Bucket) -> int:
        """Bytes of a payload."""
        return _ITEM * sum(math.prod(shape) for shape in self.shapes(bucket).values())

    def pack(self, mean_BCHW: Tensor, logvar_BCHW: Tensor, text: TextCondition) -> Tensor:
        """Payloads, uint8 (B, N) on the CPU, of what the encoders gave."""
        clip_BTE = text.text_BTE[:, : self.clip_tokens, : self.clip_width]
        t5_BTE = text.text_BTE[:, self.clip_tokens :] if self.has_t5 else text.text_BTE[:, :0]
        parts = (mean_BCHW, logvar_BCHW, clip_BTE, t5_BTE, text.pooled_BV)
        rows = torch.cat([part.flatten(1).to(torch.bfloat16) for part in parts], dim=1)
        return rows.cpu().view(torch.uint8)

    def unpack(self, rows_BN: Tensor, bucket: Bucket, dtype: torch.dtype) -> EncodedBatch:
        """The inverse of ``pack``, on the device of ``rows_BN``; copies.

        Args:
            rows_BN: uint8, contiguous, payloads of one bucket.
            bucket: Theirs.
            dtype: Of the text.
        """
        shapes = self.shapes(bucket)
        columns = rows_BN.view(torch.bfloat16).split([math.prod(s) for s in shapes.values()], dim=1)
        parts = {
            name: column.unflatten(1, shape)
            for (name, shape), column in zip(shapes.items(), columns, strict=True)
        }
        mean_BCHW, logvar_BCHW = parts["posterior"].float().chunk(2, dim=1)
        tokens = self.clip_tokens + self.t5_tokens
        text_BTE = rows_BN.new_empty(len(rows_BN), tokens, self.text_width, dtype=dtype)
        text_BTE[:, : self.clip_tokens, : self.clip_width] = parts["clip"]
        text_BTE[:, : self.clip_tokens, self.clip_width :] = 0
        text_BTE[:, self.clip_tokens :] = parts["t5"] if self.has_t5 else 0
        return EncodedBatch(
            mean_BCHW, logvar_BCHW, TextCondition(text_BTE, parts["pooled"].to(dtype))
        )


@dataclass(frozen=True)
class Preprocessing:
    """What was done to pictures and captions before they were encoded.

    Attributes:
        resolution: Side of the square bucket in pixels.
        buckets: Sizes that pictures are brought to.
        max_sequence_length: T5's tokens.
        filter: Of resizing.
    """

    resolution: int
    buckets: tuple[Bucket, ...]
    max_sequence_length: int
    filter: str = "lanczos"


@dataclass(frozen=True)
class Descriptor:
    """An encoded set.

    Attributes:
        components: Fingerprint of each encoder and tokenizer (``encoder_fingerprint``).
        preprocessing: See there.
        payload: Shapes of the payloads.
        pretrained: The model folder, as it was given when the set was made.
        dtype: The text encoders computed in it.
        decoder: It made the pixels.
        shards: How many.
        samples: In all shards.
        refused: Samples left out, by kind.
    """

    components: dict[str, str]
    preprocessing: Preprocessing
    payload: PayloadLayout
    pretrained: str
    dtype: str
    decoder: str
    shards: int
    samples: int
    refused: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the numbers in a payload mean: encoders and preprocessing."""
        known = [FORMAT_VERSION, self.components, dataclasses.asdict(self.preprocessing)]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The text of ``encoded.json``."""
        record = {
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            **dataclasses.asdict(self),
            "payload_dtype": "bfloat16, little endian",
            "payload_parts": [
                {"width": bucket.width, "height": bucket.height, **self.payload.shapes(bucket)}
                for bucket in self.preprocessing.buckets
            ],
        }
        return json.dumps(record, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes) -> Descriptor:
        """The inverse of ``to_json``.

        Raises:
            ValueError: Damaged, or of another version.
        """
        try:
            record: dict[str, Any] = json.loads(data)
            if record["version"] != FORMAT_VERSION:
                raise ValueError(f"version {record['version']}; this is version {FORMAT_VERSION}")
            fields = {f.name: record[f.name] for f in dataclasses.fields(Descriptor)}
            before = dict(fields["preprocessing"])
            before["buckets"] = tuple(Bucket(*map(int, sides)) for sides in before["buckets"])
            fields["preprocessing"] = Preprocessing(**before)
            fields["payload"] = PayloadLayout(**fields["payload"])
            descriptor = Descriptor(**fields)
            if descriptor.fingerprint != record["fingerprint"]:
                raise ValueError("changed after it was written: its fingerprint does not fit")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"damaged ({error!r})") from error
        return descriptor
