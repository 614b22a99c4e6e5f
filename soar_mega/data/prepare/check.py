"""Reads one candidate, by the index's and the decoder's own rules: could training use it?"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from soar_mega.data.decode.check import check_decodes, read_header
from soar_mega.data.errors import BadSampleError
from soar_mega.data.prepare.sources import Candidate, Part
from soar_mega.data.shards.index import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES


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
        BadSampleError: There is none, it is too long or no UTF-8.
    """
    caption = candidate.caption
    try:
        if isinstance(caption, Part):
            if caption.size > MAX_CAPTION_BYTES:
                raise BadSampleError("caption too long", f"{caption.size} bytes")
            text = read_part(caption).decode("utf-8-sig")
            caption = _from_json(text) if caption.extension == "json" else text
        data = (caption or "").strip().encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadSampleError("caption not UTF-8", error.reason) from error
    except OSError as error:
        raise BadSampleError("unreadable caption", error.strerror or "") from error
    if not data:
        raise BadSampleError("no caption", "it is empty")
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSampleError("caption too long", f"{len(data)} bytes; limit {MAX_CAPTION_BYTES}")
    return data


def check(candidate: Candidate) -> Checked:
    """Read the caption, decode the image as training would.

    Raises:
        BadSampleError: Training could not use it.
    """
    if candidate.refused or candidate.image is None:
        raise BadSampleError(candidate.refused or "no image", candidate.detail)
    caption = read_caption(candidate)
    if candidate.image.size > MAX_IMAGE_BYTES:
        raise BadSampleError("too many bytes", f"{candidate.image.size}; limit {MAX_IMAGE_BYTES}")
    try:
        data = read_part(candidate.image)
    except OSError as error:
        raise BadSampleError("unreadable image", error.strerror or "") from error
    header = read_header(data)
    check_decodes(data)
    digests = (hashlib.sha256(part).hexdigest() for part in (data, caption))
    return Checked(header.extension, header.width, header.height, *digests)


def _from_json(text: str) -> str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("no caption", f"no json: {error}") from error
    caption = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(caption, str):
        raise BadSampleError("no caption", "the json has no string field 'caption'")
    return caption
