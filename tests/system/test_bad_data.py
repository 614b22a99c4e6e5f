"""Bad data from the user's side: each is refused before training with a message that helps.

Every message must say which setting or file, what is wrong with it, and what to do.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from soar_mega.data.decode.interface import View
from soar_mega.data.decode.pil import decode_one
from soar_mega.data.encoders import FolderError, FrozenEncoders
from soar_mega.data.errors import DataError
from soar_mega.data.shards.index import build_index


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "PNG")
    return out.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def missing(folder: Path) -> str:
    return str(folder / "train-*.tar")


def uncaptioned(folder: Path) -> str:
    tar_of(folder / "train-0.tar", {"a.png": png(), "a.txt": b"x"})
    return str(tar_of(folder / "train-1.tar", {"a.png": png(), "b.png": png()}))


def truncated(folder: Path) -> str:
    path = tar_of(folder / "train-0.tar", {"a.png": png(), "a.txt": b"x"})
    path.write_bytes(path.read_bytes()[:300])
    return str(path)


def empty_file(folder: Path) -> str:
    (folder / "train-0.tar").touch()
    return str(folder / "*.tar")


def no_samples(folder: Path) -> str:
    return str(tar_of(folder / "train-0.tar", {}))


def dangling(folder: Path) -> str:
    (folder / "train-0.tar").symlink_to(folder / "gone")
    return str(folder / "*.tar")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, ["no shard matches", "train-*.tar", "Correct the path"]),
        (uncaptioned, ["train-1.tar", "none of its 2 samples has a caption", "Add the captions"]),
        (truncated, ["train-0.tar", "not readable", "Write or copy it again"]),
        (empty_file, ["train-0.tar", "not readable", "again"]),
        (no_samples, ["hold no sample", "Point the setting"]),
        (dangling, ["no shard matches"]),
    ],
)
def test_shards(tmp_path: Path, make: Callable[[Path], str], words: list[str]) -> None:
    setting = make(tmp_path)
    with pytest.raises(DataError) as caught:
        build_index(setting)
    message = str(caught.value)
    assert message.startswith(f"data.shards={setting!r}: ")
    for word in words:
        assert word in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"x"})
    path.chmod(0)
    with pytest.raises(DataError, match="permission"):
        build_index(str(path))


def test_a_folder_that_is_no_diffusers_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FolderError) as caught:
        FrozenEncoders.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"model.pretrained={str(tmp_path)!r}: ")
    assert "model_index.json" in message and "save_pretrained" in message


def test_bomb_takes_no_memory(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )
    index = build_index(str(tar_of(tmp_path / "a.tar", {"a.png": data, "a.txt": b"x"})))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.tar, key 'a'"):
        decode_one(index.read_image(0), View(64, 64), index.where(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_hostile_names_write_nothing(tmp_path: Path) -> None:
    """Members are never extracted, whatever they are called."""
    outside = tmp_path / "outside"
    shards = tmp_path / "shards"
    shards.mkdir()
    members = {"a.png": png(), "a.txt": b"x"}
    hostile = {"../outside/x.png": png(), f"{outside}/y.png": png(), "z.pkl": b"cos\nsystem\n"}
    index = build_index(str(tar_of(shards / "a.tar", {**hostile, **members})))
    assert [index.key(sample) for sample in range(len(index))] == ["a"]
    assert index.ignored() == {"odd names": 2, "other extensions": 1}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "shards"]
