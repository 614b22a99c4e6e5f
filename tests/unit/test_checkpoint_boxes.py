"""Cutting flat ranges into boxes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.checkpoint.boxes import Box, BoxedTensor, range_to_boxes
from soar_mega.parallel.layout import ParameterLayout
from soar_mega.parallel.mesh import Mesh


@st.composite
def shape_and_range(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@settings(max_examples=300, deadline=None)
@given(shape_and_range())
def test_boxes_cover_the_range_once_and_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    boxes = range_to_boxes(shape, start, stop)
    seen = []
    for offset, size, flat in boxes:
        region = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
        elements = numbers[region].reshape(-1).tolist()
        assert elements == list(range(start + flat, start + flat + math.prod(size)))
        seen += elements
    assert seen == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_range_of_a_tensor_parallel_slice_lands_in_the_global_tensor() -> None:
    layout = ParameterLayout((3, 8, 4), 1, "sharded")
    mesh = Mesh(3, 4, 1, 2, 1, 2, None, None, None, torch.device("cpu"))
    whole = torch.arange(96.0).view(3, 8, 4)
    local = whole[:, 4:].reshape(-1)
    boxed = BoxedTensor.from_range(layout, mesh, 5, 41, local[5:41])
    rebuilt = torch.full_like(whole, -1)
    for box in boxed.boxes:
        region = tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape, strict=True))
        rebuilt[region] = box.data.view(box.shape)
    assert torch.equal(rebuilt[rebuilt >= 0].sort().values, local[5:41])
    assert torch.equal(rebuilt[rebuilt >= 0], whole[rebuilt >= 0])


def test_replicated_parameters_are_written_by_tensor_rank_0_only() -> None:
    layout = ParameterLayout((4,), None)
    for tensor_rank, writes in ((0, 1), (1, 0)):
        mesh = Mesh(tensor_rank, 2, tensor_rank, 2, 0, 1, None, None, None, torch.device("cpu"))
        boxed = BoxedTensor.from_range(layout, mesh, 0, 4, torch.zeros(4))
        assert len(boxed.__create_write_items__("x", boxed)) == writes
        assert len(boxed.__create_chunk_list__()) == 1


def test_a_view_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="6 elements"):
        BoxedTensor((2, 3), [Box((0, 0), (2, 3), torch.zeros(5))])
