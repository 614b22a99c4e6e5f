"""Slices of parameters over tensor ranks, with and without padding."""

from __future__ import annotations

import pytest
import torch

from soar_mega.parallel.layout import (
    ParameterLayout,
    fill_parameter,
    local_slice,
    new_parameter,
    real_part,
)
from soar_mega.parallel.mesh import Mesh


def mesh_of(rank: int, size: int) -> Mesh:
    return Mesh(rank, size, rank, size, 0, 1, None, None, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("blocks", "size", "expected"),
    [
        (7, 4, [2, 2, 2, 1]),
        (7, 2, [4, 3]),
        (38, 8, [5, 5, 5, 5, 5, 5, 5, 3]),
        (4, 2, [2, 2]),
        (5, 4, [2, 2, 1, 0]),
        (3, 1, [3]),
    ],
)
def test_blocks_are_dealt_out_whole_and_the_last_slices_padded(
    blocks: int, size: int, expected: list[int]
) -> None:
    layout = ParameterLayout((3, blocks * 4, 2), 1, "sharded", block=4)
    assert layout.local_shape(size) == (3, expected[0] * 4, 2)
    start = 0
    for rank, count in enumerate(expected):
        mesh = mesh_of(rank, size)
        assert layout.real_shape(mesh) == (3, count * 4, 2)
        assert layout.local_offset(mesh) == (0, start, 0)
        assert local_slice(layout, mesh) == (
            slice(0, 3),
            slice(start, start + count * 4),
            slice(0, 2),
        )
        start += count * 4
    assert start == blocks * 4


def test_a_filled_parameter_holds_its_slice_and_zeros() -> None:
    layout = ParameterLayout((2, 6, 2), 1, "sharded", block=2)
    whole = torch.arange(1.0, 25.0).view(layout.global_shape)
    for rank, padded in ((0, 0), (1, 2)):
        mesh = mesh_of(rank, 2)
        parameter = new_parameter(layout, mesh)
        parameter.data = torch.full((8, 2), torch.nan)  # flattened, as linears hold it
        fill_parameter(parameter, mesh, whole[local_slice(layout, mesh)])
        local = parameter.detach().view(2, 4, 2)
        assert torch.equal(real_part(local, layout, mesh), whole[:, 4 * rank :][:, :4])
        assert torch.equal(local[:, 4 - padded :], torch.zeros(2, padded, 2))
        assert parameter.requires_grad and parameter.is_leaf


def test_a_new_parameter_has_zero_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a checkpoint writes what is real alone, into memory that nobody has cleared."""
    monkeypatch.setattr(torch, "empty", lambda shape, **kinds: torch.full(shape, 3.0, **kinds))
    layout = ParameterLayout((6, 2), 0, "sharded", block=2)
    assert new_parameter(layout, mesh_of(0, 2)).eq(3.0).all()
    assert new_parameter(layout, mesh_of(1, 2))[2:].eq(0.0).all()


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (ParameterLayout((2, 6), 1), "does not divide by the tensor-parallel size 4"),
        (ParameterLayout((2, 6), 1, block=4), "does not divide by the block 4"),
    ],
)
def test_a_dimension_that_cannot_be_cut_is_refused(layout: ParameterLayout, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"dimension 1 of \(2, 6\) {rule}"):
        layout.local_shape(4)
