"""Between torch's tensors and the arrays of ``raw_tensors``; both share their memory."""

from __future__ import annotations

import torch
from torch import Tensor

from soar_mega.checkpoint.raw_tensors import Array

# Code of the safetensors format -> torch's dtype.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def code_of(dtype: torch.dtype) -> str:
    """The dtype's code; of one that files do not know its name, which ``header`` refuses."""
    return _CODES.get(dtype, str(dtype))


def as_array(tensor: Tensor) -> Array:
    """A CPU tensor's memory, of any strides; bfloat16 by its bits."""
    tensor = tensor.detach()
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: Array = bits.numpy()
    return array


def as_tensor(array: Array) -> Tensor:
    """An array's memory, of any strides; the bits of bfloat16 as such."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
