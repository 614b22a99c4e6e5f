"""Looks at samples and tars, in worker processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from soar_mega.data.decode.check import check_decodes, read_header
from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.index import CAPTION_KIND, HEIGHT, WIDTH, Shard, ShardIndex, scan_shard
from soar_mega.data.shards.scan import CUT, scan_tar
from soar_mega.data.shards.write_index import IndexedPicture

NO_CAPTION_LENGTH = -1


@dataclass(frozen=True)
class Bad:
    """Something that training could not use, or that is not as the index says."""

    kind: str
    where: str
    detail: str


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of one shard, and how closely to look.

    Attributes:
        number: Of the shard.
        first: Row of the first sample in the shard.
        samples: The shard cut down to them.
        recorded: The index's sha256 of each; empty where there is nothing to compare.
        verify: Read and decode everything.
    """

    number: int
    first: int
    samples: Shard
    recorded: list[str | None]
    verify: bool


@dataclass
class Look:
    """What a piece's samples are like.

    Attributes:
        number, first: The piece's.
        pictures: Of each sample; without a hash where the bytes were not read.
        caption_lengths: In characters, or ``NO_CAPTION_LENGTH``.
        bad: What is wrong, in order.
    """

    number: int
    first: int
    pictures: list[IndexedPicture] = field(default_factory=list)
    caption_lengths: list[int] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)


def look(piece: Piece) -> Look:
    """Read the samples of a piece."""
    seen = Look(piece.number, piece.first)
    index = ShardIndex([piece.samples])
    for row in range(len(index)):
        try:
            seen.caption_lengths.append(len(index.read_caption(row)))
        except BadSampleError as error:
            seen.caption_lengths.append(NO_CAPTION_LENGTH)
            seen.bad.append(Bad(error.kind, index.where(row), str(error)))
        seen.pictures.append(_picture(piece, index, row, seen.bad))
    return seen


def _picture(piece: Piece, index: ShardIndex, row: int, bad: list[Bad]) -> IndexedPicture:
    """Size and hash of a picture (or payload); faults are added to ``bad``."""
    width, height = (int(piece.samples.table[row, column]) for column in (WIDTH, HEIGHT))
    told, encoded, where = (width, height), piece.samples.encoded, index.where(row)
    if not piece.verify and (encoded or width):  # without an index no width is known
        return IndexedPicture(width, height, None)
    sha256 = None
    try:
        data = index.read_image(row)
        sha256 = hashlib.sha256(data).hexdigest()
        if piece.recorded and piece.recorded[row] not in (None, sha256):
            bad.append(Bad("bytes changed", where, "its sha256 is not the index's"))
        if not encoded:
            header = read_header(data)
            width, height = header.width, header.height
            if told not in ((0, 0), (width, height)):
                detail = f"{width} x {height} pixels, the index says {told[0]} x {told[1]}"
                bad.append(Bad("index differs from the tar", where, detail))
            if piece.verify:
                check_decodes(data)
    except BadSampleError as error:
        bad.append(Bad(error.kind, where, str(error)))
    return IndexedPicture(width, height, sha256)


def compare_with_tar(shard: Shard) -> list[Bad]:
    """What a shard with an index says against the member headers of its tar."""
    try:
        if shard.encoded:  # payloads are no members that a scan knows: only the tar is looked at
            tar = Shard(
                shard.path, shard.size, shard.keys, shard.table, scan_tar(shard.path).ignored
            )
        else:
            tar = scan_shard(shard.path)
    except DataError as error:
        return [Bad("unusable tar", shard.path, str(error))]
    rows = zip(tar.keys, tar.table.tolist(), strict=True)
    places = {key: row[: CAPTION_KIND + 1] for key, row in rows}
    bad = cut_short(tar)
    for row, (key, told) in enumerate(zip(shard.keys, shard.table.tolist(), strict=True)):
        found = places.pop(key, None)
        if found is None:
            detail = "the index has it, the tar has not"
        elif found != told[: CAPTION_KIND + 1]:
            detail = f"members at {found[:4]}, the index says {told[:4]}"
        else:
            continue
        bad.append(Bad("index differs from the tar", shard.where(row), detail))
    for key in places:
        detail = "the tar has it, the index has not"
        bad.append(Bad("index differs from the tar", f"{shard.path}, key {key!r}", detail))
    return bad


def cut_short(shard: Shard) -> list[Bad]:
    """The fault of a tar that ends too early, if this one does."""
    detail = "what came after is lost; write or copy it again"
    return [Bad(CUT, shard.path, detail)] if shard.ignored[CUT] else []
