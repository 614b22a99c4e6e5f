"""Aspect buckets: their sizes, and which picture goes where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.data.buckets import Bucket, bucket_of, make_buckets


@settings(max_examples=100, deadline=None)
@given(units=st.integers(1, 128), ratio=st.floats(1, 4))
def test_sizes(units: int, ratio: float) -> None:
    resolution = 16 * units
    buckets = make_buckets(resolution, ratio)
    assert Bucket(resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    ratios = [bucket.width / bucket.height for bucket in buckets]
    assert ratios == sorted(ratios) and len(set(ratios)) == len(ratios)
    for width, height in buckets:
        assert width % 16 == height % 16 == 0
        assert width * height <= resolution**2
        assert max(width, height) / min(width, height) <= ratio
        assert Bucket(height, width) in buckets
        # No larger one of the same height, so little is wasted.
        if width > height:
            step = 16 * max(units // 16, 1)
            wider = width + step
            assert (
                wider * height > resolution**2
                or wider > resolution * ratio
                or (wider / height > ratio)
            )


def test_known_sizes() -> None:
    assert make_buckets(512, 1.0) == (Bucket(512, 512),)
    assert [tuple(bucket) for bucket in make_buckets(64, 2.0)] == [(48, 80), (64, 64), (80, 48)]
    widths = [bucket.width for bucket in make_buckets(1024, 2.0)]
    assert widths == [704, 768, 832, 896, 960, 1024, 1088, 1152, 1216, 1344, 1408]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=20),
    ratio=st.floats(1, 4),
)
def test_the_nearest_ratio(sizes: list[tuple[int, int]], ratio: float) -> None:
    buckets = make_buckets(512, ratio)
    found = bucket_of(buckets, np.array(sizes))
    assert found.dtype == np.int64
    for (width, height), place in zip(sizes, found.tolist(), strict=True):
        distances = [abs(np.log(width / height * b.height / b.width)) for b in buckets]
        assert distances[place] == pytest.approx(min(distances), abs=1e-9)


def test_a_bucket_is_its_own_and_unknown_sizes_are_square() -> None:
    buckets = make_buckets(512, 2.0)
    assert bucket_of(buckets, np.array(buckets)).tolist() == list(range(len(buckets)))
    square = buckets.index(Bucket(512, 512))
    unknown = np.array([[0, 0], [0, 300], [300, 0]])
    assert bucket_of(buckets, unknown).tolist() == [square] * 3
