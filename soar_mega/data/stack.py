"""A growing stack of equal rows."""

from __future__ import annotations

import torch
from torch import Tensor


class RowStack:
    """A stack of equal rows that grows by doubling, so that a step is one index_select."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: Tensor | None = None
        self._used = 0

    def append(self, rows: Tensor) -> range:
        """Add rows; returns their numbers."""
        first, last = self._used, self._used + len(rows)
        if self._stack is None or last > len(self._stack):
            room = max(last, 2 * first)
            grown = torch.empty(room, *rows.shape[1:], dtype=rows.dtype, device=self._device)
            if self._stack is not None:
                grown[:first] = self._stack[:first]
            self._stack = grown
        self._stack[first:last] = rows
        self._used = last
        return range(first, last)

    def select(self, numbers: list[int], device: torch.device) -> Tensor:
        """Copies of some rows, on ``device``."""
        assert self._stack is not None
        chosen = torch.tensor(numbers, device=self._device)
        return self._stack.index_select(0, chosen).to(device, non_blocking=True)
