"""The decoder of ``data.decoder``."""

from __future__ import annotations

from typing import Literal

from soar_mega.data.decode.dali import DaliDecoder, Filter
from soar_mega.data.decode.interface import Decoder
from soar_mega.data.decode.pil import PilDecoder


def make_decoder(
    name: Literal["pil", "dali"],
    num_threads: int,
    *,
    batch_size: int = 32,
    device_id: int | None = None,
    filter: Filter = "lanczos",
) -> Decoder:
    """A decoder with threads of its own.

    Args:
        name: ``pil`` or ``dali``.
        num_threads: Decoding threads.
        batch_size: Pictures that DALI decodes at a time, at most.
        device_id: CUDA device for DALI; None for the CPU.
        filter: DALI's filter; PIL's is Lanczos.

    Raises:
        DataError: DALI is asked for and not installed.
    """
    if name == "pil":
        return PilDecoder(num_threads)
    return DaliDecoder(num_threads, batch_size, device_id, filter)
