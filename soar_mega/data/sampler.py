"""Which sample stands in which slot of which step: a pure function of (seed, step).

Samples are drawn epoch after epoch, each epoch a permutation of all samples, without a gap:
position ``p = step * global_batch_size + slot`` is place ``p % n`` of epoch ``p // n``. Nothing
depends on ranks, workers or what was read before, so resuming needs the step number only, and a
step may span an epoch border (or several, where the set is smaller than the batch).

Legend: N samples, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soar_mega.rng import Purpose, uniform

_CHUNK = 1 << 18  # bounds the generator's temporaries


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of one epoch, int64 (N,).

    Each sample gets a 46-bit key from two draws of the project's generator at (seed, SHUFFLE,
    epoch, sample), and the order sorts the keys; equal keys keep their order, so the result is the
    same for every version of torch.
    """
    keys_N = torch.empty(num_samples, dtype=torch.int64)
    for start in range(0, num_samples, _CHUNK):
        slots_C = torch.arange(start, min(start + _CHUNK, num_samples))
        draws_C2 = uniform(seed, Purpose.SHUFFLE, epoch, slots_C, 2).double()
        high_C, low_C = (draws_C2 * 2**23).long().unbind(1)
        keys_N[start : start + _CHUNK] = high_C * 2**23 + low_C
    return torch.argsort(keys_N, stable=True)


class Sampler:
    """The global order of a training run.

    Args:
        num_samples: Size of the set, at least 1.
        seed: The run's seed.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: a sampler needs at least one sample")
        self.num_samples = num_samples
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def order(self, epoch: int) -> Tensor:
        """``epoch_order``, with the last two epochs kept."""
        order_N = self._orders.get(epoch)
        if order_N is None:
            order_N = epoch_order(self.num_samples, self.seed, epoch)
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = order_N
        return order_N

    def positions(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Epochs and samples, int64 (P,) each, of the positions ``start`` to ``stop - 1``."""
        epochs: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        samples: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        while start < stop:
            epoch, place = divmod(start, self.num_samples)
            taken = min(stop - start, self.num_samples - place)
            epochs.append(torch.full((taken,), epoch, dtype=torch.int64))
            samples.append(self.order(epoch)[place : place + taken])
            start += taken
        return torch.cat(epochs), torch.cat(samples)

    def samples_of_step(self, step: int, global_batch_size: int) -> list[tuple[int, int]]:
        """``(epoch, sample)`` of every slot of a step, in slot order."""
        start = step * global_batch_size
        epochs_P, samples_P = self.positions(start, start + global_batch_size)
        return list(zip(epochs_P.tolist(), samples_P.tolist(), strict=True))
