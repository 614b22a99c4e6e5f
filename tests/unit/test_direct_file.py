"""Files written past the page cache hold what was written, and fail as others do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from soar_mega.checkpoint import direct_file
from soar_mega.checkpoint.direct_file import create
from soar_mega.checkpoint.exporter import export
from soar_mega.checkpoint.from_diffusers import convert_from_diffusers
from soar_mega.checkpoint.manifest import verify
from tests.runs import Tiny


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few blocks are large."""
    monkeypatch.setattr(direct_file, "SMALLEST", 0)
    monkeypatch.setattr(direct_file, "_BLOCK", 8192)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    file = create(tmp_path / "probe", 1)
    file.close()
    if not isinstance(file, direct_file.DirectFile):
        pytest.skip("the file system of temporary files knows no O_DIRECT")
    return tmp_path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.integers(0, 20000), max_size=6))
def test_any_pieces_arrive(folder: Path, sizes: list[int]) -> None:
    pieces = [os.urandom(size) for size in sizes]
    with create(folder / "file", sum(sizes)) as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
        file.flush()
        os.fsync(file.fileno())
    assert (folder / "file").read_bytes() == b"".join(pieces)


def test_an_older_file_is_replaced(folder: Path) -> None:
    (folder / "file").write_bytes(b"x" * 50000)
    with create(folder / "file", 9) as file:
        file.write(b"123456789")
        file.flush()
    assert (folder / "file").read_bytes() == b"123456789"


def test_a_full_disk_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = create(folder / "file", 10**6)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        for _ in range(10):
            file.write(bytes(8192))
        file.flush()
    file.close()


def test_without_it_the_page_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    with create(tmp_path / "file", 10) as file:
        file.write(b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"
    assert not isinstance(file, direct_file.DirectFile)


def test_small_files_go_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_file, "SMALLEST", 11)
    with create(tmp_path / "file", 10) as file:
        file.write(b"0123456789")
    assert not isinstance(file, direct_file.DirectFile)


def test_converters_write_the_same_files(folder: Path, tiny: Tiny) -> None:
    transformer = tiny.pretrained / "transformer"
    ours = convert_from_diffusers(transformer, folder / "ours")
    export(ours, folder / "back", transformer_only=True)
    (source,) = transformer.glob("*.safetensors")
    kept, got = load_file(source), load_file(folder / "back" / source.name)
    assert kept.keys() == got.keys()
    assert all(torch.equal(kept[key], got[key]) for key in kept)
    assert not verify(ours)
