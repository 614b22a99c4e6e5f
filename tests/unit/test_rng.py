"""The generator: known answers, accuracy, statistics, and draws that belong to their address."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soar_mega import rng
from soar_mega.rng import Purpose, keyed_normal, keyed_normal_slice, normal, uniform

Draw = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("draw", [uniform, normal])


def bits(x: Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in x.contiguous().view(torch.int32).flatten().tolist()]


# --- known answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    words = [torch.tensor([[int(word, 16)]]) for word in counter.split()]
    out = rng.philox(words, low | high << 32)
    assert [f"{int(word):08x}" for word in out] == answer.split()


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The same generator in Python integers."""
    mask = 0xFFFFFFFF
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & mask, a >> 32 ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def test_the_address_is_where_the_module_says() -> None:
    seed, step, path, index = 0xFEDCBA9876543210, 0xFFFFFFFF, 4095, 17
    slots = torch.tensor([0, 5, 0xFFFFFFFF])
    drawn = uniform(seed, Purpose.SAMPLING, step, slots, 9, path=path, index=index)
    for row, slot in enumerate(slots.tolist()):
        for element in range(9):
            counter = [element // 4, slot, step, 11 << 24 | path << 12 | index]
            word = plain_philox(counter, [seed & 0xFFFFFFFF, seed >> 32])[element % 4]
            assert float(drawn[row, element]) == ((word >> 9) + 0.5) / 2**23


GOLDEN_UNIFORM = [0x3DBE7CA8, 0x3F21E199, 0x3F66271B, 0x3E2B0244, 0x3EE92A9A, 0x3DC3A0D8]
GOLDEN_NORMAL = [0xBFBBF292, 0xBFCE284D, 0x3E6B5D8A, 0x3ECCD2FF, 0x3F847C85, 0x3F355901]
GOLDEN_KEYED = [0x3FB2B77F, 0xC0247381, 0x3F01B43D, 0xBFE7740C]
# Confirmed by numpy, whose fp32 root is the nearest one on every processor.
GOLDEN_MANY = "3fa8a08641ebc967"


def test_frozen_values() -> None:
    """A run that is resumed by a later version must go on with the same numbers."""
    slots = torch.tensor([0, 1, 12345])
    assert bits(uniform(2026, Purpose.NOISE, 3, slots, 2, path=1, index=2)) == GOLDEN_UNIFORM
    assert bits(normal(2026, Purpose.NOISE, 3, slots, 2, path=1, index=2)) == GOLDEN_NORMAL
    assert bits(keyed_normal(2026, "blocks.0.attention.image_qkv.weight", 4)) == GOLDEN_KEYED
    many = normal(2026, Purpose.NOISE, 3, slots, 4099).contiguous().numpy().tobytes()
    assert hashlib.sha256(many).hexdigest()[:16] == GOLDEN_MANY


def test_the_purposes_keep_their_numbers() -> None:
    names = "TIMESTEP NOISE AUX_SIGMA ROLLOUT_NOISE PROMPT_DROPOUT FLIP CROP VAE_POSTERIOR INIT"
    names += " SHUFFLE VALIDATION SAMPLING"
    assert [purpose.name for purpose in Purpose] == names.split()
    assert [int(purpose) for purpose in Purpose] == list(range(12))


# --- accuracy ---------------------------------------------------------------------------------


def some_words() -> Tensor:
    """Random words and the ones at every octave, octant and end."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 1 << 32, (1 << 17,), generator=generator)
    corners = torch.tensor([k << 29 for k in range(9)] + [1 << k for k in range(33)])
    near = (corners[:, None] + torch.arange(-300, 300)).flatten().clamp(0, (1 << 32) - 1)
    return torch.cat([random, near])


def ulps(got: Tensor, exact: Tensor) -> float:
    spacing = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    return float(((got.double() - exact).abs() / spacing.clamp_min(2.0**-60)).max())


def test_log_is_within_two_ulps() -> None:
    words = some_words()
    # What the fp32 argument holds: the word and a half, rounded to 24 bits.
    value = torch.from_numpy((words.double() + 0.5).numpy().astype(np.float32)).double()
    got = rng._minus_log(words)
    assert ulps(got, -torch.log(value / 2**32)) < 2
    assert got.min() == 0 and got.max() < 23


def test_cos_and_sin_are_within_two_ulps() -> None:
    words = some_words()
    angle = (words >> 5 << 5).double() * (2 * math.pi / 2**32)
    cosine, sine = rng._cos_sin(words)
    assert (cosine.double() - angle.cos()).abs().max() < 1.5 * 2.0**-24
    assert (sine.double() - angle.sin()).abs().max() < 1.5 * 2.0**-24
    # Relative to the value, away from where the fp64 angle itself is no longer exact enough.
    for got, exact in ((cosine, angle.cos()), (sine, angle.sin())):
        large = exact.abs() > 1e-9
        assert ulps(got[large], exact[large]) < 2
    assert rng._cos_sin(torch.tensor([0, 1 << 30, 1 << 31, 3 << 30]))[0].tolist() == [1, 0, -1, 0]
    assert rng._cos_sin(torch.tensor([0, 1 << 30, 1 << 31, 3 << 30]))[1].tolist() == [0, 1, 0, -1]


def test_the_ends_of_uniform_are_inside() -> None:
    ends = rng._unit_interval(torch.tensor([0, 511, 512, (1 << 32) - 1]))
    assert ends.dtype == torch.float32
    assert ends.tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 1 - 2.0**-24]


def test_the_longest_normals_are_finite() -> None:
    length, angle = torch.tensor([[0, 0, (1 << 32) - 1]]), torch.tensor([[0, 1 << 30, 12345]])
    extreme = rng._normals([length, angle, length, angle])
    assert torch.isfinite(extreme).all()
    assert float(extreme.max()) == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)


# --- statistics -------------------------------------------------------------------------------

COUNT = 1 << 20


def test_uniform_is_uniform() -> None:
    u = uniform(1, Purpose.NOISE, 0, torch.arange(64), COUNT // 64).double().flatten()
    assert 0 < u.min() < 4 / COUNT and 1 - 4 / COUNT < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * COUNT)
    assert abs(u.var() - 1 / 12) < 5 / math.sqrt(180 * COUNT)
    histogram = torch.histc(u, 256, 0, 1)
    chi = ((histogram - COUNT / 256) ** 2 / (COUNT / 256)).sum()
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_normal_is_normal() -> None:
    x = normal(1, Purpose.NOISE, 0, torch.arange(64), COUNT // 64).double().flatten()
    error = 1 / math.sqrt(COUNT)
    assert abs(x.mean()) < 5 * error
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2) * error
    assert abs((x**3).mean()) < 5 * math.sqrt(15) * error
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96) * error
    cdf = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    assert (cdf - (torch.arange(COUNT) + 0.5) / COUNT).abs().max() < 1.95 * error
    for bound in (3.0, 4.0):
        expected = COUNT * math.erfc(bound / math.sqrt(2))
        assert abs((x.abs() > bound).sum() - expected) < 5 * math.sqrt(expected)
    by_place = x.view(-1, 4)  # the four of a block
    assert (torch.corrcoef(by_place.T) - torch.eye(4)).abs().max() < 10 * error


@BOTH
def test_neighbouring_addresses_are_independent(draw: Draw) -> None:
    numel, slots = 1 << 14, torch.tensor([0, 1, 2])
    rows = [
        draw(seed, purpose, step, slots, numel, path=path, index=index)
        for seed, purpose, step, path, index in [
            (1, Purpose.NOISE, 0, 0, 0),
            (2, Purpose.NOISE, 0, 0, 0),
            (1 << 32, Purpose.NOISE, 0, 0, 0),
            (1, Purpose.ROLLOUT_NOISE, 0, 0, 0),
            (1, Purpose.NOISE, 1, 0, 0),
            (1, Purpose.NOISE, 0, 1, 0),
            (1, Purpose.NOISE, 0, 0, 1),
            (1, Purpose.NOISE, 0, 1, 1),
        ]
    ]
    table = torch.cat(rows).double()
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert correlation.abs().max() < 5 / math.sqrt(numel)
    shifted = torch.corrcoef(torch.stack([table[0, :-1], table[0, 1:], table[1, :-1]]))
    assert (shifted - torch.eye(3)).abs().max() < 5 / math.sqrt(numel)


# --- draws belong to their address ------------------------------------------------------------


@BOTH
def test_any_microbatch_draws_the_same_bits(draw: Draw) -> None:
    slots = torch.tensor([4, 0, 7, 7, 1 << 31, 9])
    whole = draw(1, Purpose.NOISE, 2, slots, 37)
    for cut in ([1] * 6, [2, 4], [5, 1], [3, 3]):
        parts = [draw(1, Purpose.NOISE, 2, part, 37) for part in slots.split(cut)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole[2], whole[3]) and not torch.equal(whole[0], whole[1])


@BOTH
def test_a_shorter_draw_is_a_prefix(draw: Draw) -> None:
    slots = torch.arange(3)
    long = draw(1, Purpose.NOISE, 2, slots, 41)
    for numel in range(1, 41):
        short = draw(1, Purpose.NOISE, 2, slots, numel)
        assert short.shape == (3, numel) and torch.equal(short, long[:, :numel])


@BOTH
def test_paths_and_indices_may_be_drawn_together(draw: Draw) -> None:
    pairs = list(itertools.product(range(3), range(4)))
    slots = torch.tensor([8, 9])
    together = draw(
        1, Purpose.AUX_SIGMA, 5, slots.repeat(12), 3,
        path=torch.tensor([p for p, _ in pairs]).repeat_interleave(2),
        index=torch.tensor([k for _, k in pairs]).repeat_interleave(2),
    )  # fmt: skip
    alone = [draw(1, Purpose.AUX_SIGMA, 5, slots, 3, path=p, index=k) for p, k in pairs]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique(dim=0)) == 24


@BOTH
def test_torchs_generator_is_neither_read_nor_moved(draw: Draw) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(1, Purpose.NOISE, 0, torch.arange(2), 5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, draw(1, Purpose.NOISE, 0, torch.arange(2), 5))


@BOTH
def test_nothing_is_read_back_from_a_device(draw: Draw) -> None:
    slots = torch.arange(2)
    assert draw(1, Purpose.NOISE, 0, slots, 5, device="meta").shape == (2, 5)
    there = slots.to("meta")
    assert draw(1, Purpose.NOISE, 0, there, 5, path=there, index=3).is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_a_gpu_draws_the_same_bits(draw: Draw) -> None:
    slots = torch.arange(64)
    here = draw(1, Purpose.NOISE, 3, slots, 1 << 16)
    there = draw(1, Purpose.NOISE, 3, slots, 1 << 16, device="cuda")
    assert torch.equal(here, there.cpu())
    words = some_words()
    assert torch.equal(rng._minus_log(words), rng._minus_log(words.cuda()).cpu())
    for a, b in zip(rng._cos_sin(words), rng._cos_sin(words.cuda()), strict=True):
        assert torch.equal(a, b.cpu())


# --- weights ----------------------------------------------------------------------------------


def test_a_range_of_a_parameter_is_part_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keyed_normal(5, "a.weight", 1003)
    monkeypatch.setattr(rng, "_CHUNK", 64)
    assert torch.equal(keyed_normal(5, "a.weight", 1003), whole)
    for start, stop in [(0, 0), (0, 1), (1, 2), (3, 5), (60, 70), (63, 257), (999, 1003)]:
        assert torch.equal(
            keyed_normal(5, "a.weight", 1003, start=start, stop=stop), whole[start:stop]
        )


def test_parameters_and_seeds_differ() -> None:
    rows = [keyed_normal(s, n, 4096) for s in (5, 6) for n in ("a.weight", "a.bias", "b.weight")]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(4096)


@pytest.mark.parametrize(
    ("shape", "slices"),
    [
        ((13,), (slice(3, 9),)),
        ((8, 6), (slice(2, 4), slice(None))),
        ((8, 6), (slice(0, 8), slice(3, 6))),
        ((3, 8, 5), (slice(None), slice(4, 8), slice(0, 5))),
        ((3, 8, 5), (slice(1, 3), slice(2, 2), slice(None))),
    ],
)
def test_a_tensor_parallel_slice_is_a_box_of_the_whole(
    shape: tuple[int, ...], slices: tuple[slice, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keyed_normal(5, "w", math.prod(shape)).view(shape)
    for chunk in (1 << 20, 16, 4):
        monkeypatch.setattr(rng, "_CHUNK", chunk)
        assert torch.equal(keyed_normal_slice(5, "w", shape, slices), whole[slices])


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed = -1 "),
        ({"seed": 1 << 64}, "seed = "),
        ({"step": 1 << 32}, "step = "),
        ({"step": -1}, "step = -1 "),
        ({"numel": 0}, "numel"),
        ({"path": 4096}, "path = 4096 "),
        ({"index": -1}, "index = -1 "),
        ({"slots_B": torch.tensor([0, -1])}, "slots_B = -1 "),
        ({"slots_B": torch.tensor([1 << 32])}, "slots_B = "),
        ({"slots_B": torch.tensor([0.5])}, "int64"),
        ({"slots_B": torch.zeros(1, 1, dtype=torch.int64)}, "one-dimensional"),
        ({"path": torch.tensor([4096, 0])}, "path = 4096 "),
    ],
)
@BOTH
def test_an_address_out_of_range_is_refused(
    draw: Draw, changes: dict[str, Any], message: str
) -> None:
    address = {"seed": 1, "purpose": Purpose.NOISE, "step": 0, "numel": 4} | changes
    address.setdefault("slots_B", torch.arange(2))
    with pytest.raises(ValueError, match=message):
        draw(**address)


def test_a_range_or_a_slice_that_does_not_fit_is_refused() -> None:
    for start, stop in [(-1, 2), (3, 2), (0, 11)]:
        with pytest.raises(ValueError, match=r"'w' is not inside \[0, 10\)"):
            keyed_normal(1, "w", 10, start=start, stop=stop)
    for slices in ((slice(0, 1),), (slice(0, 2, 2), slice(None))):
        with pytest.raises(ValueError, match="do not fit the shape"):
            keyed_normal_slice(1, "w", (2, 5), slices)
