"""Handlers note a signal and do nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from soar_mega import train
from soar_mega.launch.signals import ASKING, LEAD_VARIABLE, Signals, signal_lead


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in ASKING]
    signals = Signals()
    signals.listen()
    try:
        assert signals.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # Slurm's second word
        assert signals.received == number.name
    finally:
        signals.close()
    assert [signal.getsignal(one) for one in ASKING] == before


def test_the_second_interrupt_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    signals = Signals()
    signals.listen()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert "once more ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    finally:
        signals.close()


def test_signals_are_noted_until_the_exit_code_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(
        train, "write_exit_code", lambda *_: during.append(signal.getsignal(signal.SIGTERM))
    )
    assert train.main(["/no/such.yaml"]) == 78
    assert len(during) == 1 and during[0] != before == signal.getsignal(signal.SIGTERM)


def test_another_thread_has_no_signals() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    signals = Signals()
    thread = threading.Thread(target=signals.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("value", "lead"), [("300", 300.0), ("", None), ("soon", None)])
def test_lead(value: str, lead: float | None) -> None:
    assert signal_lead({LEAD_VARIABLE: value}) == lead
    assert signal_lead({}) is None


def test_a_rank_with_a_bad_configuration_lets_rank_0_print_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Launchers end rank 0 as soon as another rank fails, be it in the middle of its imports.
    config = tmp_path / "x.yaml"
    config.write_text("nonsense: 1\n")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train, "_RANK_0_SECONDS", 60.0)
    ending = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    ending.start()
    began = time.monotonic()
    assert train.main([str(config)]) == 78
    assert 0.4 < time.monotonic() - began < 30
    ending.join()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    began = time.monotonic()
    assert train.main([str(config)]) == 78
    assert time.monotonic() - began < 30
    assert "nonsense" in capsys.readouterr().err
