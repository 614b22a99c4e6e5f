"""Models of one base are drawn with encoders that were loaded once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from soar_mega.evaluation import models
from soar_mega.evaluation.models import LastEncoders


def test_loaded_once_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    def load(folder: Path, *, device: torch.device, dtype: torch.dtype) -> object:
        assert (device, dtype) == (torch.device("cpu"), torch.float16)
        if folder.name == "damaged":
            raise ValueError("damaged")
        loaded.append(folder)
        return object()

    def model(base: str) -> Any:
        return SimpleNamespace(base=Path(base))

    monkeypatch.setattr(models.FrozenEncoders, "load", load)
    encoders = LastEncoders(torch.device("cpu"), torch.float16)
    first = encoders.of(model("one"))
    assert encoders.of(model("one")) is first
    other = encoders.of(model("other"))
    assert other is not first and encoders.of(model("other")) is other
    assert encoders.of(model("one")) is not first
    with pytest.raises(ValueError, match="damaged"):
        encoders.of(model("damaged"))
    encoders.of(model("one"))
    assert loaded == [Path("one"), Path("other"), Path("one"), Path("one")]
