"""What is known of one shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from soar_mega.data.shards.remote import shown

# Columns of Shard.table.
DATA_OFFSET, DATA_SIZE, CAPTION_OFFSET, CAPTION_SIZE, CAPTION_KIND, WIDTH, HEIGHT = range(7)
NO_CAPTION = -1


@dataclass(frozen=True)
class Shard:
    """The samples of one tar, in the order in which their keys appear.

    Attributes:
        path: Where the tar lies.
        size: Its length in bytes.
        keys: Sample keys, unique within the shard.
        table: int64 (len(keys), 7): offset and size in bytes of the picture's (or payload's) data,
            of the caption's, the caption's place in ``CAPTION_EXTENSIONS`` or ``NO_CAPTION``, and
            the picture's upright width and height in pixels, 0 where unknown.
        ignored: How many members were left out, by reason.
        encoded: Its samples are payloads of an encoded set, not pictures.
    """

    path: str
    size: int
    keys: list[str]
    table: np.ndarray
    ignored: Counter[str]
    encoded: bool = False

    def where(self, row: int) -> str:
        """A sample's place in words, for messages."""
        return f"{shown(self.path)}, key {self.keys[row]!r}"
