"""What several files share: one spawn of four processes, whose start takes most of its time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.test_padded_heads import OnFour, work_on_four
from tests.runs import SIZES, Tiny, make_small_tiny


@pytest.fixture(scope="session")
def on_four(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> OnFour:
    """Cases of test_training_layouts, and what test_padded_heads does with seven heads."""
    folder = tmp_path_factory.mktemp("on_four")
    seven = make_small_tiny(folder / "seven", replace(SIZES, num_attention_heads=7))
    return OnFour(folder, seven, run_ranks(4, work_on_four, tiny, seven, folder))
