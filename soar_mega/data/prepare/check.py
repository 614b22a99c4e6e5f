"""Reads one candidate, by the index's and the decoder's own rules: could training use it?"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from soar_mega.data.decode.geometry import swaps_sides
from soar_mega.data.decode.interface import View
from soar_mega.data.decode.pil import decode_opened, open_picture, orientation
from soar_mega.data.errors import BadSampleError
from soar_mega.data.prepare.sources import Candidate, Part
from soar_mega.data.shards.index import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_SMALL = View(16, 16)


class RefusedError(Exception):
    """A candidate that can be no sample; ``kind`` is one of a few, the message has more."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True)
class Checked:
    """An accepted sample.

    Attributes:
        extension: jpg, png or webp, by what the bytes are, whatever the file was called.
        width: In pixels, upright.
        height: In pixels, upright.
        sha256: Of the image's bytes, in hex.
        caption_sha256: Of the caption as written, in hex.
    """

    extension: str
    width: int
    height: int
    sha256: str
    caption_sha256: str


def read_part(part: Part) -> bytes:
    """The bytes; fewer than ``part.size`` where the file became shorter.

    Raises:
        OSError: The file cannot be read.
    """
    with open(part.path, "rb") as file:
        file.seek(part.offset)
        return file.read(part.size)


def read_caption(candidate: Candidate) -> bytes:
    """The caption as it is written to shards: UTF-8, without white space around it.

    Raises:
        RefusedError: There is none, it is too long or no UTF-8.
    """
    caption = candidate.caption
    try:
        if isinstance(caption, Part):
            if caption.size > MAX_CAPTION_BYTES:
                raise RefusedError("caption too long", f"{caption.size} bytes")
            text = read_part(caption).decode("utf-8-sig")
            caption = _from_json(text) if caption.extension == "json" else text
        data = (caption or "").strip().encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise RefusedError("caption not UTF-8", error.reason) from error
    except OSError as error:
        raise RefusedError("unreadable caption", error.strerror or "") from error
    if not data:
        raise RefusedError("no caption", "it is empty")
    if len(data) > MAX_CAPTION_BYTES:
        raise RefusedError("caption too long", f"{len(data)} bytes; limit {MAX_CAPTION_BYTES}")
    return data


def check(candidate: Candidate) -> Checked:
    """Read the caption, decode the image as training would.

    Raises:
        RefusedError: Training could not use it.
    """
    if candidate.refused or candidate.image is None:
        raise RefusedError(candidate.refused or "no image", candidate.detail)
    caption = read_caption(candidate)
    if candidate.image.size > MAX_IMAGE_BYTES:
        raise RefusedError("too many bytes", f"{candidate.image.size}; limit {MAX_IMAGE_BYTES}")
    try:
        data = read_part(candidate.image)
    except OSError as error:
        raise RefusedError("unreadable image", error.strerror or "") from error
    extension, width, height = _decoded(data, candidate.source)
    digests = (hashlib.sha256(part).hexdigest() for part in (data, caption))
    return Checked(extension, width, height, *digests)


def _decoded(data: bytes, source: str) -> tuple[str, int, int]:
    """(extension, upright width, upright height) of a picture that decodes."""
    try:
        opened = open_picture(data, source)
        extension, (width, height) = EXTENSIONS[str(opened.format)], opened.size
        decode_opened(opened, _SMALL, source)
    except BadSampleError as error:
        raise RefusedError(error.kind, str(error.__cause__ or error)) from error
    if swaps_sides(orientation(opened)):
        width, height = height, width
    return extension, width, height


def _from_json(text: str) -> str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError("no caption", f"no json: {error}") from error
    caption = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(caption, str):
        raise RefusedError("no caption", "the json has no string field 'caption'")
    return caption
