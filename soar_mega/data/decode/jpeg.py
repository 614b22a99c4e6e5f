"""Whether a JPEG's structure is whole, without decoding it."""

from __future__ import annotations

import re

# After a scan's start: the next marker that is no stuffed byte, restart or padding.
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN, _END = 0xDA, 0xD9
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all Huffman-coded


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a baseline or progressive JPEG of 8 bits and 1 or 3 components.

    Walks the markers from the start of the picture to its end: one frame, then scans. None for any
    other JPEG and for one that is cut or out of order.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    position = 2
    size: tuple[int, int] | None = None
    scanned = False
    while data[position : position + 1] == b"\xff":
        while data[position + 1 : position + 2] == b"\xff":  # padding
            position += 1
        if position + 1 >= len(data):
            return None
        marker = data[position + 1]
        if marker == _END:
            return size if scanned else None
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        # Markers below 0xC0 and restarts outside a scan have no length to step over.
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8:
            return None
        position += 2 + length
        if marker in _PLAIN_FRAMES:
            if size is not None or len(body) < 6 or body[0] != 8 or body[5] not in (1, 3):
                return None
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
            if 0 in size:
                return None
        if marker == _START_OF_SCAN:
            found = _MARKER_IN_SCAN.search(data, position)
            if size is None or found is None:
                return None
            position, scanned = found.start(), True
    return None
