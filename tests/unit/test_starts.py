"""Crashes from the same step are counted, and end."""

from __future__ import annotations

from pathlib import Path

import pytest

from soar_mega.launch.exit_codes import FILE_VARIABLE, write_exit_code
from soar_mega.training.starts import FILE_NAME, count_start, forget_starts


def test_the_third_crash_is_the_last(tmp_path: Path) -> None:
    assert [count_start(tmp_path, 5, 3) for _ in range(3)] == [None] * 3
    for _ in range(2):
        problem = count_start(tmp_path, 5, 3)
        assert problem is not None
        assert "crashed 3 times in a row without getting past step 5" in problem
        assert str(tmp_path / FILE_NAME) in problem


def test_progress_and_a_clean_end_begin_the_count_anew(tmp_path: Path) -> None:
    for step in (0, 0, 5, 5, 5):
        assert count_start(tmp_path, step, 3) is None
    forget_starts(tmp_path)
    forget_starts(tmp_path)
    assert count_start(tmp_path, 5, 1) is None
    assert count_start(tmp_path, 5, 1) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 5}', '{"step": 5, "starts": "x"}'])
def test_a_damaged_count_keeps_nobody_from_starting(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    assert count_start(tmp_path, 5, 1) is None
    assert count_start(tmp_path, 5, 1) is not None


@pytest.mark.parametrize(
    ("variables", "written"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"SLURM_PROCID": "1"}, False)],
)
def test_rank_0_leaves_its_exit_code(
    variables: dict[str, str], written: bool, tmp_path: Path
) -> None:
    file = tmp_path / "code"
    write_exit_code(75, {FILE_VARIABLE: str(file), **variables})
    assert [path.name for path in tmp_path.iterdir()] == (["code"] if written else [])
    if written:
        assert file.read_text() == "75\n"
    write_exit_code(75, variables)
