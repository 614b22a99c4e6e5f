"""Tensors as arrays and back: every dtype, any strides, one memory; casts round as torch does."""

from __future__ import annotations

import pytest
import torch

from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.raw_tensors import STORAGE, cast, header
from soar_mega.checkpoint.torch_arrays import DTYPES, as_array, as_tensor, code_of


def test_both_tables_know_the_same_dtypes_and_none_twice() -> None:
    assert DTYPES.keys() == STORAGE.keys()
    assert len(set(STORAGE.values())) == len(STORAGE)


@pytest.mark.parametrize("code", DTYPES)
def test_there_and_back_is_the_same_memory(code: str) -> None:
    whole = torch.arange(24).reshape(4, 6).to(DTYPES[code])
    for tensor in (whole, whole.T[1:, ::2], whole[1, 1], whole[:0]):
        array = as_array(tensor)
        assert array.dtype == STORAGE[code] and array.shape == tensor.shape
        back = as_tensor(array)
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)
        assert tensor.numel() == 0 or back.data_ptr() == tensor.data_ptr()
    assert code_of(whole.dtype) == code


@pytest.mark.parametrize("new", ["F64", "F32", "BF16", "F16"])
@pytest.mark.parametrize("old", ["F64", "F32", "BF16", "F16"])
def test_a_cast_is_torchs(old: str, new: str) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(1000) * 1000).to(DTYPES[old])
    array = as_array(tensor)
    assert (cast(array, new) is array) == (old == new)
    assert torch.equal(as_tensor(cast(array, new)), tensor.to(DTYPES[new]))


def test_a_dtype_that_files_do_not_know_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"x: torch\.complex64"):
        header({"x": ((1,), code_of(torch.complex64))})
