"""What several test files share: the small tiny folder, made once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.runs import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A small model folder and its shards; nobody writes into it."""
    # Here, so that tests/gpu can be collected, and skipped, without our dependencies.
    from tests.runs import make_small_tiny

    return make_small_tiny(tmp_path_factory.mktemp("tiny"))
