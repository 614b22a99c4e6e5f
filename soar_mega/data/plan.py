"""What each step wants: which pictures, seen how, in which slots.

A data-parallel rank owns a contiguous block of the global batch's slots. A plan is a function of
(seed, data, step) and of nothing that was read.

Legend: B slots of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from soar_mega.data.buckets import Bucket
from soar_mega.data.decode.interface import View
from soar_mega.data.order import Draw, Order, OrderState
from soar_mega.parallel.mesh import Mesh
from soar_mega.rng import Purpose, uniform


class Picture(NamedTuple):
    """A sample, and what is made of its image."""

    sample: int
    view: View


@dataclass(frozen=True)
class StepPlan:
    """A data-parallel rank's part of a step.

    Attributes:
        step: From 0.
        slots_B: int64 positions in the global batch.
        draws: The sample in each slot.
        pictures: What is wanted of it.
        after: The order's position after this step.
    """

    step: int
    slots_B: Tensor
    draws: Sequence[Draw]
    pictures: Sequence[Picture]
    after: OrderState


class Planner:
    """Plans steps one after the other.

    Args:
        order: Of the samples.
        buckets: Sizes in pixels; the order's bucket numbers count them.
        mesh: This process's place.
        seed: The run's seed (crops and flips).
        global_batch_size: Slots a step, over all data-parallel ranks.
        group_size: Consecutive slots of one bucket; divides every rank's share.
        random_crop: Draw where a picture is cut; else in the middle.
        random_flip: Mirror each slot's picture with probability 1/2.
        step: The first step to plan.
        state: The order's position before that step.
    """

    def __init__(
        self,
        order: Order,
        buckets: Sequence[Bucket],
        mesh: Mesh,
        *,
        seed: int,
        global_batch_size: int,
        group_size: int = 1,
        random_crop: bool = False,
        random_flip: bool = False,
        step: int = 0,
        state: OrderState | None = None,
    ) -> None:
        share = global_batch_size // mesh.data_size
        if global_batch_size % mesh.data_size or share % group_size:
            raise ValueError(
                f"train.global_batch_size={global_batch_size}: {mesh.data_size} data-parallel "
                f"ranks must each get whole groups of {group_size} samples. Change one of them."
            )
        self.order, self._buckets, self._mesh, self._seed = order, buckets, mesh, seed
        self._groups, self._share = global_batch_size // group_size, share
        self._random_crop, self._random_flip = random_crop, random_flip
        self._step = step
        self.state = order.start if state is None else state

    def next(self) -> StepPlan:
        """The plan of the next step."""
        draws, self.state = self.order.take(self.state, self._groups)
        first = self._mesh.data_rank * self._share
        own = draws[first : first + self._share]
        slots_B = torch.arange(first, first + self._share)
        places = [0.5] * len(own)
        flips = [False] * len(own)
        if self._random_crop:
            draws_B1 = uniform(self._seed, Purpose.CROP, self._step, slots_B, 1)
            places = draws_B1[:, 0].tolist()
        if self._random_flip:
            draws_B1 = uniform(self._seed, Purpose.FLIP, self._step, slots_B, 1)
            flips = (draws_B1[:, 0] < 0.5).tolist()
        pictures = []
        for draw, place, flip in zip(own, places, flips, strict=True):
            width, height = self._buckets[self.order.bucket(draw.sample)]
            pictures.append(Picture(draw.sample, View(height, width, place, flip)))
        self._step += 1
        return StepPlan(self._step - 1, slots_B, own, pictures, self.state)
