"""Cutting flat ranges into boxes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.checkpoint.boxes import Box, BoxedTensor, range_to_boxes
from soar_mega.parallel.layout import ParameterLayout, local_slice, real_part
from soar_mega.parallel.mesh import Mesh


def mesh_of(rank: int, size: int) -> Mesh:
    return Mesh(rank, size, rank, size, 0, 1, None, None, None, torch.device("cpu"))


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
        rebuilt[region] = box.data
    assert torch.equal(rebuilt[rebuilt >= 0].sort().values, local[5:41])
    assert torch.equal(rebuilt[rebuilt >= 0], whole[rebuilt >= 0])


def test_replicated_parameters_are_written_by_tensor_rank_0_only() -> None:
    layout = ParameterLayout((4,), None)
    for tensor_rank, writes in ((0, 1), (1, 0)):
        boxed = BoxedTensor.from_range(layout, mesh_of(tensor_rank, 2), 0, 4, torch.zeros(4))
        assert len(boxed.__create_write_items__("x", boxed)) == writes
        assert len(boxed.__create_chunk_list__()) == 1


@st.composite
def cut_layout(draw: st.DrawFn) -> tuple[ParameterLayout, int, list[float]]:
    """A layout, padded or not, a tensor size, and where to cut for data ranks (0 to 1)."""
    size = draw(st.integers(1, 5))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = draw(st.none() | st.integers(0, len(shape) - 1))
    block = draw(st.none() | st.integers(1, 3)) if dim is not None else None
    if dim is not None:
        shape[dim] *= block or size
    cuts = draw(st.lists(st.floats(0, 1), max_size=3))
    return ParameterLayout(tuple(shape), dim, block=block), size, sorted([0.0, *cuts, 1.0])


@settings(max_examples=300, deadline=None)
@given(cut_layout())
def test_boxes_of_all_ranks_cover_the_global_tensor_once(
    case: tuple[ParameterLayout, int, list[float]],
) -> None:
    """Saved from zero-padded slices and loaded into others; padding is neither read nor written."""
    layout, tensor_size, cuts = case
    whole = torch.arange(1.0, 1 + math.prod(layout.global_shape)).view(layout.global_shape)
    written = torch.zeros_like(whole)
    for tensor_rank in range(tensor_size):
        mesh = mesh_of(tensor_rank, tensor_size)
        local = torch.zeros(layout.local_shape(tensor_size))
        real_part(local, layout, mesh).copy_(whole[local_slice(layout, mesh)])
        loaded = torch.zeros_like(local)
        ends = [int(cut * local.numel()) for cut in cuts]
        for start, stop in pairwise(ends):
            source, target = (
                BoxedTensor.from_range(layout, mesh, start, stop, tensor.view(-1)[start:stop])
                for tensor in (local, loaded)
            )
            assert len(source.boxes) <= 2 * local.dim() - 1
            for box, hole in zip(source.boxes, target.boxes, strict=True):
                assert 0 not in box.shape
                region = tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape, strict=True))
                assert torch.equal(box.data, whole[region])
                written[region] += source.contribute
                hole.data.copy_(whole[region])
        assert torch.equal(loaded, local)
    assert torch.equal(written, torch.ones_like(whole))


def test_a_view_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a tensor of that shape, got \(3, 2\)"):
        BoxedTensor((2, 3), [Box((0, 0), (2, 3), torch.zeros(3, 2))])
