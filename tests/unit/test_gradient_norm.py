"""The norm of a large gradient: exact, and without a copy of all of it."""

from __future__ import annotations

import pytest
import torch

from soar_mega.parallel import sharded
from soar_mega.parallel.sharded import squared_norm


@pytest.mark.parametrize("size", [0, 1, 16, 17, 1000])
def test_pieces_give_the_whole_norm(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_NORM_PIECE", 16)
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = squared_norm(values)
    assert found.dtype == torch.float64 and found.dim() == 0
    assert float(found) == pytest.approx(float(values.double().square().sum()), rel=1e-14)


def test_no_more_than_a_piece_is_copied() -> None:
    """torch itself makes the copy inside the norm, where only its memory tells."""
    values = torch.zeros(3 * sharded._NORM_PIECE, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        squared_norm(values)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 1.1 * 8 * sharded._NORM_PIECE
