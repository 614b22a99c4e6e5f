"""What several test files share: the small tiny folder, made once a session."""

from __future__ import annotations

import pytest

from tests.runs import Tiny, make_small_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A small model folder and its shards; nobody writes into it."""
    return make_small_tiny(tmp_path_factory.mktemp("tiny"))
