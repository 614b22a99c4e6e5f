"""Counter-based random numbers: every draw is a function of its address, never of who draws it.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
written as integer tensor operations. A draw's address is (seed, purpose, step, slot, path, index,
element), so ranks that share a slot compute the same value without talking, a microbatch may be cut
anywhere, and a resumed run goes on where it stopped.

The bits are the same on a CPU and a GPU. ``torch.log``, ``cos`` and ``sin`` differ, so Box-Muller
is built here from operations with a single rounding (add, multiply, divide tensor by tensor, square
root), with the range reduced exactly on the integer bits. Do not compile these functions and use no
``addcmul``, ``lerp`` or division by a Python number in them: each may fuse or replace a rounding.

Address layout (each word 32 bits):
    key      seed
    word 0   element // 4 (one Philox block makes four elements)
    word 1   slot, the position in the global batch
    word 2   training step
    word 3   purpose (8 bits) | path (12 bits) | index (12 bits)

Legend: B slots, N elements (``numel``), K = ceil(N / 4) blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_PATH_BITS = 12
_INDEX_BITS = 12
MAX_PATHS = 1 << _PATH_BITS
MAX_INDICES = 1 << _INDEX_BITS
MAX_NUMEL = 4 << 32

_CHUNK = 1 << 20  # elements of a long draw worked on at a time; a multiple of 4


class Purpose(IntEnum):
    """What a draw is for. The values are part of the address: never renumber them."""

    TIMESTEP = 0
    NOISE = 1
    AUX_SIGMA = 2
    ROLLOUT_NOISE = 3
    PROMPT_DROPOUT = 4
    FLIP = 5
    CROP = 6
    VAE_POSTERIOR = 7
    INIT = 8
    SHUFFLE = 9
    VALIDATION = 10
    SAMPLING = 11


def uniform(
    seed: int,
    purpose: Purpose,
    step: int,
    slots_B: Tensor,
    numel: int,
    *,
    path: int | Tensor = 0,
    index: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform numbers strictly inside (0, 1): odd multiples of 2^-24.

    Args:
        seed: Run seed, 0 <= seed < 2^64.
        purpose: What the draw is for.
        step: Training step, 0 <= step < 2^32.
        slots_B: int64 slots, each in [0, 2^32).
        numel: Elements per slot, 1 to 2^34. A shorter draw is a prefix of a longer one.
        path: Rollout path below 4096, or an int64 tensor (B,) with one per row.
        index: Auxiliary index below 4096, or an int64 tensor (B,) with one per row.
        device: Where the result lies; the device of ``slots_B`` by default.

    Returns:
        (B, numel) fp32.

    Raises:
        ValueError: A part of the address is out of range.
    """
    words = _draw(seed, purpose, step, slots_B, numel, path, index, device)
    return _unit_interval(torch.stack(words, dim=-1)).flatten(1)[:, :numel]


def normal(
    seed: int,
    purpose: Purpose,
    step: int,
    slots_B: Tensor,
    numel: int,
    *,
    path: int | Tensor = 0,
    index: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers, at most 6.8 in magnitude; arguments and errors as in ``uniform``.

    Returns:
        (B, numel) fp32.
    """
    words = _draw(seed, purpose, step, slots_B, numel, path, index, device)
    return _normals(words).flatten(1)[:, :numel]


def keyed_normal(
    seed: int,
    name: str,
    numel: int,
    *,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements [start, stop) of the normal draw that belongs to a name: initial weights.

    Args:
        seed: Run seed, 0 <= seed < 2^64.
        name: Parameter name; draws of different names are independent.
        numel: Elements of the whole parameter.
        start: First element wanted.
        stop: End of the range; ``numel`` by default.
        device: Where the result lies.

    Returns:
        (stop - start,) fp32; memory beyond the result is that of about 2^20 elements.

    Raises:
        ValueError: The seed or the range is invalid.
    """
    stop = numel if stop is None else stop
    _require("seed", seed, 1 << 64)
    _require("numel", numel, MAX_NUMEL + 1)
    if not 0 <= start <= stop <= numel:
        raise ValueError(f"range [{start}, {stop}) of {name!r} is not inside [0, {numel})")
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    key = int.from_bytes(digest, "little")
    tag = int(Purpose.INIT) << (_PATH_BITS + _INDEX_BITS)
    result = torch.empty(stop - start, dtype=torch.float32, device=device)
    for chunk in range(start // 4 * 4, stop, _CHUNK):
        end = min(chunk + _CHUNK, stop)
        words = philox([_blocks(chunk // 4, -(-end // 4), device), 0, 0, tag], key, device)
        first = max(chunk, start)
        result[first - start : end - start] = _normals(words).flatten()[first - chunk : end - chunk]
    return result


def keyed_normal_slice(
    seed: int,
    name: str,
    shape: Sequence[int],
    slices: Sequence[slice],
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A box of a parameter's initial draw, for example what one tensor-parallel rank owns.

    Bit for bit ``keyed_normal(seed, name, prod(shape)).view(shape)[slices]``, without holding the
    whole parameter. ``slices`` has one slice without step for each dimension of ``shape``.

    Raises:
        ValueError: The slices do not fit the shape.
    """
    if len(slices) != len(shape) or not shape or any(part.step is not None for part in slices):
        raise ValueError(f"slices {tuple(slices)} of {name!r} do not fit the shape {tuple(shape)}")
    ranges = [range(*part.indices(size)) for part, size in zip(slices, shape, strict=True)]
    result = torch.empty([len(r) for r in ranges], dtype=torch.float32, device=device)
    numel, row_numel = math.prod(shape), math.prod(shape[1:])
    rows = max(1, _CHUNK // max(row_numel, 1))
    low, high = ranges[0].start, ranges[0].start + len(ranges[0])
    for row in range(low, high, rows):
        end = min(row + rows, high)
        start, stop = row * row_numel, end * row_numel
        drawn = keyed_normal(seed, name, numel, start=start, stop=stop, device=device)
        result[row - low : end - low] = drawn.view(-1, *shape[1:])[(slice(None), *slices[1:])]
    return result


def _require(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise ValueError(f"{name} = {value} must be at least 0 and below {limit}")


def _per_row(name: str, value: int | Tensor, limit: int) -> int | Tensor:
    """An address part, checked; as a column if a tensor (not read back from a device to check)."""
    if isinstance(value, int):
        _require(name, value, limit)
        return value
    if value.dtype != torch.int64 or value.dim() != 1:
        kind = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{name} must be a one-dimensional int64 tensor, not {kind}")
    if value.device.type == "cpu" and value.numel():
        _require(name, int(value.min()), limit)
        _require(name, int(value.max()), limit)
    return value[:, None]


def _draw(
    seed: int,
    purpose: Purpose,
    step: int,
    slots_B: Tensor,
    numel: int,
    path: int | Tensor,
    index: int | Tensor,
    device: torch.device | str | None,
) -> list[Tensor]:
    """Four int64 tensors (B, K) of 32-bit words."""
    _require("seed", seed, 1 << 64)
    _require("purpose", purpose, 1 << 8)
    _require("step", step, 1 << 32)
    _require("numel - 1", numel - 1, MAX_NUMEL)
    slots = _per_row("slots_B", slots_B, 1 << 32)
    tag = (_per_row("path", path, MAX_PATHS) << _INDEX_BITS) + (
        _per_row("index", index, MAX_INDICES) + (int(purpose) << (_PATH_BITS + _INDEX_BITS))
    )
    device = device or slots_B.device
    return philox([_blocks(0, -(-numel // 4), device), slots, step, tag], seed, device)


def _blocks(first: int, stop: int, device: torch.device | str) -> Tensor:
    return torch.arange(first, stop, dtype=torch.int64, device=device)[None]


def philox(
    counter: Sequence[int | Tensor], key: int, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Philox4x32-10: four counter words, each in [0, 2^32), under a 64-bit key.

    A word is a Python int or an int64 tensor of two dimensions; the words broadcast.
    """
    c0, c1, c2, c3 = (
        word.to(device, non_blocking=True)
        if isinstance(word, Tensor)
        else torch.full((1, 1), word, dtype=torch.int64, device=device)
        for word in counter
    )
    key0, key1 = key & _MASK, key >> 32
    for _ in range(_ROUNDS):
        # The signed product wraps modulo 2^64, so its bits are those of the unsigned product.
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c2 = (
            (product1 >> 32).bitwise_and_(_MASK) ^ c1 ^ key0,
            (product0 >> 32).bitwise_and_(_MASK) ^ c3 ^ key1,
        )
        c1, c3 = product1.bitwise_and_(_MASK), product0.bitwise_and_(_MASK)
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK, (key1 + _KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


def _unit_interval(word: Tensor) -> Tensor:
    """(k + 1/2) / 2^23 from the top 23 bits: every value is exact in fp32 and none is 0 or 1."""
    return ((word >> 9).float() + 0.5) * 2.0**-23


# ln 2 in two parts; the first has 17 bits, so that its product with 0..33 is exact.
_LN2_HIGH = math.floor(math.log(2.0) * 2**17) / 2**17
_LN2_LOW = math.log(2.0) - _LN2_HIGH
_HALF_ROOT_BITS = 0x3F3504F3  # the fp32 sqrt(1/2)
_ONE_BITS = 0x3F800000
_QUARTER_PI = math.pi / 4
_QUARTER_PI_HIGH = math.floor(_QUARTER_PI * 2**24) / 2**24
_QUARTER_PI_LOW = _QUARTER_PI - _QUARTER_PI_HIGH
_LOG_SERIES = [2 / 9, 2 / 7, 2 / 5, 2 / 3]
_SIN_SERIES = [_QUARTER_PI**n / math.factorial(n) * (-1) ** (n // 2) for n in (9, 7, 5, 3)]
_COS_SERIES = [_QUARTER_PI**n / math.factorial(n) * (-1) ** (n // 2) for n in (10, 8, 6, 4, 2)]


def _polynomial(x: Tensor, coefficients: Sequence[float], last: float) -> Tensor:
    """Horner, highest power first, ending in the constant ``last``."""
    total = x * coefficients[0]
    for coefficient in coefficients[1:]:
        total = (total + coefficient) * x
    return total + last


def _minus_log(word: Tensor) -> Tensor:
    """-ln((word + 1/2) / 2^32), fp32, within a few ulps; 0 for the last 128 words."""
    value = (word >> 8).float() * 256.0 + ((word & 0xFF).float() + 0.5)
    # value = 2^exponent * mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
    bits = value.view(torch.int32) + (_ONE_BITS - _HALF_ROOT_BITS)
    octaves = (32 + 127 - (bits >> 23)).float()
    mantissa = ((bits & 0x7FFFFF) + _HALF_ROOT_BITS).view(torch.float32)
    f = mantissa - 1.0
    s = f / (f + 2.0)
    log_mantissa = f - s * (f - _polynomial(s * s, _LOG_SERIES, 0.0))
    return octaves * _LN2_HIGH + (octaves * _LN2_LOW - log_mantissa)


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi * word / 2^32 (cut to 27 bits), fp32, within a few ulps."""
    turned = word + (1 << 29)
    quadrant = turned >> 30
    rest = (turned & ((1 << 30) - 1)) - (1 << 29)
    x = (rest >> 5).float() * 2.0**-24  # in [-1, 1), in units of pi / 4, exact
    square = x * x
    sine = x * _QUARTER_PI_HIGH + x * _polynomial(square, _SIN_SERIES, _QUARTER_PI_LOW)
    cosine = _polynomial(square, _COS_SERIES, 1.0)
    swap = (quadrant & 1).bool()
    cos_sign = (1 - ((quadrant + 1) & 2)).float()
    sin_sign = (1 - (quadrant & 2)).float()
    return (
        torch.where(swap, sine, cosine) * cos_sign,
        torch.where(swap, cosine, sine) * sin_sign,
    )


def _normals(words: Sequence[Tensor]) -> Tensor:
    """Box-Muller: words 0 and 1 make normals 0 and 1, words 2 and 3 make 2 and 3; (B, K, 2, 2)."""
    square = _minus_log(torch.stack((words[0], words[2]), dim=-1)) * 2.0
    # By way of fp64, which gives the one nearest fp32 everywhere: MKL's own fp32 root, which torch
    # takes for large tensors on some processors, is off in the last bit once in a hundred times.
    radius = square.double().sqrt().float()
    cosine, sine = _cos_sin(torch.stack((words[1], words[3]), dim=-1))
    return torch.stack((radius * cosine, radius * sine), dim=-1)
