"""Files that ask a run to save or stop, on one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from soar_mega.parallel.mesh import Mesh
from soar_mega.training.requests import SAVE_NOW, STOP_NOW, Agreed, Requests


@pytest.mark.parametrize("names", [(), (SAVE_NOW,), (STOP_NOW,), (SAVE_NOW, STOP_NOW)])
@pytest.mark.parametrize("failed", [False, True])
def test_asked_until_answered(names: tuple[str, ...], failed: bool, tmp_path: Path) -> None:
    requests = Requests(tmp_path, Mesh.single())
    for name in names:
        (tmp_path / name).touch()
    expected = Agreed(SAVE_NOW in names, STOP_NOW in names, failed)
    for _ in range(2):
        assert requests.agree(failed=failed) == expected
    assert requests.answered(expected) == []
    assert requests.agree() == Agreed(False, False, False)
    assert not list(tmp_path.iterdir())


def test_what_was_not_seen_is_not_removed(tmp_path: Path) -> None:
    """A file that came after the look is answered the next time."""
    requests = Requests(tmp_path, Mesh.single())
    agreed = requests.agree()
    (tmp_path / SAVE_NOW).touch()
    requests.answered(agreed)
    assert requests.agree().save


def test_a_file_that_cannot_be_removed(tmp_path: Path) -> None:
    """It is told once, and does not make the run save after every step."""
    (tmp_path / SAVE_NOW).mkdir()
    requests = Requests(tmp_path, Mesh.single())
    agreed = requests.agree()
    assert agreed.save
    (problem,) = requests.answered(agreed)
    assert str(tmp_path / SAVE_NOW) in problem
    assert not requests.agree().save


def test_no_folder(tmp_path: Path) -> None:
    assert Requests(tmp_path / "gone", Mesh.single()).agree() == Agreed(False, False, False)
