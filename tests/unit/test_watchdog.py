"""What makes no progress ends, and leaves the stacks of its threads."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import REPOSITORY

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from soar_mega.config.schema import WatchdogConfig
from soar_mega.launch import watchdog as module

def sleeping_loader():
    time.sleep(60)

def holding_the_lock():  # no Python thread runs meanwhile
    ctypes.PyDLL(None).sleep(60)

def slow_but_alive():
    for _ in range(10):
        time.sleep(0.2)
        watchdog.alive()

settings = WatchdogConfig(step_minutes=0.5 / 60, validation_minutes=0.5 / 60)
module.GRACE_S = 0.5
with module.Watchdog(settings, Path(sys.argv[1]), 3) as watchdog:
    time.sleep(1)  # the start has an hour
    watchdog.enter(sys.argv[2])
    globals()[sys.argv[3]]()
    watchdog.enter("save")
    time.sleep(1)
time.sleep(2)  # nobody watches any more
print("ended")
"""


def run(folder: Path, phase: str, what: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), phase, what],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=50,
    )
    return done, time.monotonic() - began


@pytest.mark.parametrize("phase", ["step", "validation"])
def test_a_hang_ends_with_its_stacks(phase: str, tmp_path: Path) -> None:
    done, took = run(tmp_path, phase, "sleeping_loader")
    assert done.returncode == 1 and took < 40
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name == "rank-00003.txt"
    for text in (file.read_text(), done.stderr):  # the last ones come from faulthandler
        assert "sleeping_loader" in text
    assert f"watchdog.{phase}_minutes" in done.stderr and "rank 3 on " in done.stderr
    assert done.stderr.count("no sign of life") == 1


def test_a_hang_that_holds_the_interpreter_ends_too(tmp_path: Path) -> None:
    done, took = run(tmp_path, "step", "holding_the_lock")
    assert done.returncode == 1 and took < 40
    assert "holding_the_lock" in done.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "stacks").touch()
    done, _ = run(tmp_path, "step", "sleeping_loader")
    assert done.returncode == 1 and "could not be written" in done.stderr
    assert "sleeping_loader" in done.stderr


def test_what_shows_life_is_left_alone(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "validation", "slow_but_alive")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
    assert not (tmp_path / "stacks").exists()
