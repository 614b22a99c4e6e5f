"""Shards and index files made to do harm: nothing is run or written, memory stays flat, and the
message names the file and the fix."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards import scan
from soar_mega.data.shards.index import MAX_IMAGE_BYTES, build_index, scan_shard
from tests.remote_shards import index_record, indexed_shards
from tests.unit.test_data_index import picture, write_tar

GOOD = [("a.png", picture()), ("a.txt", b"x")]


class Canary:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_nothing_is_run_or_written(tmp_path: Path) -> None:
    shards = tmp_path / "a" / "b"
    shards.mkdir(parents=True)
    poison = pickle.dumps(Canary(tmp_path / "canary"))
    bad: list[tuple[str, bytes]] = [(f"a.{end}", poison) for end in ("pkl", "pyd", "pth", "pickle")]
    bad += [("../../x.png", picture()), (f"{tmp_path}/y.png", picture()), ("z/../../w.png", b"")]
    path = write_tar(shards / "0.tar", [*bad, *GOOD])
    with tarfile.open(path, "a") as tar:
        for name, kind in [
            ("dir.png", tarfile.SYMTYPE),  # a later member would be written through it
            ("h.png", tarfile.LNKTYPE),
            ("c.png", tarfile.CHRTYPE),
            ("b.png", tarfile.BLKTYPE),
            ("f.png", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path)
            tar.addfile(info)
        info = tarfile.TarInfo("dir.png/evil.png")
        tar.addfile(info, io.BytesIO())
    before = tree(tmp_path)
    index = build_index(str(path))
    assert [index.key(n) for n in range(len(index))] == ["a", "dir.png/evil"]
    assert (index.read_image(0), index.read_caption(0)) == (picture(), "x")
    assert index.read_image(1) == b""
    assert index.ignored() == {
        "other extensions": 4,
        "odd names": 3,
        "links, devices and sparse files": 5,
    }
    assert tree(tmp_path) == before


def repeated_member(path: Path, count: int) -> None:
    """A tar of ``count`` empty members."""
    block = tarfile.TarInfo("x.cls").tobuf()
    with open(path, "wb") as file:
        for start in range(0, count, 1000):
            file.write(block * min(1000, count - start))
        file.write(bytes(1024))


def test_members_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    monkeypatch.setattr(scan, "MAX_MEMBERS", 2000)
    repeated_member(path, 2000)
    tracemalloc.start()
    assert scan.scan_tar(str(path)).ignored == {"other extensions": 2000}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18  # they are not kept
    repeated_member(path, 2001)
    with pytest.raises(DataError, match=r"a\.tar: more than 2000 members.*prepare_data"):
        scan_shard(str(path))


@pytest.mark.full
def test_a_million_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    repeated_member(path, scan.MAX_MEMBERS + 1)
    with pytest.raises(DataError, match="more than 1000000 members"):
        scan_shard(str(path))


def test_long_names_are_not_kept(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*GOOD, ("n" * 5000 + ".png", b"")])
    shard = scan_shard(str(path))
    assert (shard.keys, shard.ignored) == (["a"], {"odd names": 1})


def test_global_headers_do_not_pile_up(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        for number in range(200):
            file.write(tarfile.TarInfo.create_pax_global_header({f"k{number}": "v" * 10_000}))
            file.write(tarfile.TarInfo("x.cls").tobuf())
        file.write(bytes(1024))
    tracemalloc.start()
    assert scan.scan_tar(str(path)).ignored == {"other extensions": 200}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19


TEN_GB = 10 * 2**30


def plain_hole(path: Path) -> None:
    """A member of 10 GB that takes up no disk."""
    info = tarfile.TarInfo("a.png")
    info.size = TEN_GB
    caption = tarfile.TarInfo("a.txt")
    caption.size = 1
    with open(path, "wb") as file:
        file.write(info.tobuf())
        file.seek(TEN_GB, os.SEEK_CUR)
        file.write(caption.tobuf() + b"x".ljust(512, b"\0") + bytes(1024))


def gnu_sparse(path: Path, size: int = 0) -> None:
    """A whole sample; GNU's old kind, of ``size`` bytes that "expand" to 10 GB; the end."""
    info = tarfile.TarInfo("s.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"%011o\0" % 0, b"%011o\0" % 0
    block[483:495] = tarfile.itn(TEN_GB, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    sample = write_tar(path, GOOD).read_bytes()
    path.write_bytes(sample.rstrip(b"\0") + bytes(511) + bytes(block) + bytes(1024))


def pax_sparse(path: Path) -> None:
    """The new kind, whose map of holes is endless."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("s.png")
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "s.png",
            "GNU.sparse.realsize": str(TEN_GB),
        }
        info.size = 1024
        tar.addfile(info, io.BytesIO(b"99999999999\n" + b"0\n" * 506))


def flat(action: Callable[[], object]) -> object:
    """What ``action`` gives; it may take 4 MiB and 20 seconds."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        return action()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22 and time.monotonic() - start < 20


def test_a_member_of_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    plain_hole(path)
    index = flat(lambda: build_index(str(path)))
    assert index.read_caption(0) == "x"  # type: ignore[attr-defined]
    with pytest.raises(BadSampleError, match=f"{TEN_GB} bytes; limit {MAX_IMAGE_BYTES}") as seen:
        flat(lambda: index.read_image(0))  # type: ignore[attr-defined]
    assert seen.value.kind == "too many bytes"
    Path(f"{path}.index.json").write_text(json.dumps(index_record(path)))
    with pytest.raises(BadSampleError, match="limit"):
        flat(lambda: build_index(str(path)).read_image(0))


def test_sparse_members_are_ignored_or_refused(tmp_path: Path) -> None:
    gnu_sparse(tmp_path / "a.tar")
    shard: Any = flat(lambda: scan_shard(str(tmp_path / "a.tar")))
    assert (shard.keys, shard.ignored) == (["a"], {"links, devices and sparse files": 1})
    pax_sparse(tmp_path / "b.tar")
    with pytest.raises(DataError, match=r"b\.tar: not readable as an uncompressed tar"):
        flat(lambda: scan_shard(str(tmp_path / "b.tar")))


@pytest.mark.parametrize("older", [True, False])
def test_members_of_negative_size_do_not_go_round_in_circles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    monkeypatch.setattr(scan, "MAX_MEMBERS", 1000)
    if older:  # Python before the fix of CVE-2025-8194
        monkeypatch.setattr(tarfile.TarInfo, "_block", lambda self, count: -(-count // 512) * 512)
    path = tmp_path / "a.tar"
    for size in ("0", "-1", "-512", "-1536"):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in ("a.cls", "b.cls"):
                info = tarfile.TarInfo(name)
                info.pax_headers = {"size": size} if name == "b.cls" else {}
                tar.addfile(info)
        if size == "0":
            assert scan.scan_tar(str(path)).ignored == {"other extensions": 2}
            continue
        with pytest.raises(DataError, match=r"a\.tar: ") as seen:
            flat(lambda: scan_shard(str(path)))
        assert "more than" not in str(seen.value)  # nor ended by their number alone
    gnu_sparse(path, -512)
    with pytest.raises(DataError, match=r"a member of \d+ bytes at"):
        flat(lambda: scan_shard(str(path)))


def test_a_chain_of_extended_headers(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    (tmp_path / "a.tar").write_bytes(info.tobuf() * 5000 + bytes(1024))
    with pytest.raises(DataError, match=r"a\.tar: "):
        flat(lambda: scan_shard(str(tmp_path / "a.tar")))


# --- index files -------------------------------------------------------------------------------


def first(**changes: object) -> Callable[[dict[str, Any]], object]:
    def change(record: dict[str, Any]) -> object:
        record["samples"][0].update(changes)
        return record

    return change


def whole(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda record: {**record, **changes}


def twice(record: dict[str, Any]) -> object:
    record["samples"][1]["key"] = record["samples"][0]["key"]
    return record


def overlapping(record: dict[str, Any]) -> object:
    record["samples"][1]["image"] = record["samples"][0]["image"]
    return record


def without(name: str) -> Callable[[dict[str, Any]], object]:
    def change(record: dict[str, Any]) -> object:
        del record["samples"][1][name]
        return record

    return change


CASES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another tar's": (whole(size=1024), "stale: it is of a tar of 1024 bytes"),
    "size is text": (whole(size="x" * 9999), "stale"),
    "size is true": (whole(size=True), "stale"),
    "newer": (whole(version=2), "version 2; this is version 1"),
    "behind the end": (first(image=[10**6, 1]), "outside the tar"),
    "too long": (first(image=[512, 10**6]), "outside the tar"),
    "negative": (first(image=[-512, 10]), "outside the tar"),
    "negative size": (first(caption=[512, -1]), "outside the tar"),
    "sum wraps round": (first(image=[2**62, 2**62]), "outside the tar"),
    "beyond 64 bits": (first(image=[2**70, 1]), "damaged index .Overflow"),
    "overlap": (overlapping, "overlap"),
    "same place": (first(caption=[512, 10]), "overlap"),
    "keys twice": (twice, "keys twice"),
    "huge picture": (first(width=10**9), "pixels a side"),
    "negative picture": (first(height=-1), "outside the tar"),
    "fraction": (first(width=1.5), "numbers of key"),
    "text for number": (first(width="16"), "numbers of key"),
    "digits for pair": (first(image="12"), "numbers of key"),
    "true": (first(width=True), "numbers of key"),
    "columns shifted": (first(image=[512], caption=[2048, 9, 9]), "numbers of key"),
    "key leaves": (first(key="../x"), "key '../x'"),
    "key is absolute": (first(key="/etc/x"), "key '/etc/x'"),
    "key is no text": (first(key={"a": 1}), "damaged index"),
    "key is huge": (first(key="x" * 10**6), "damaged index"),
    "no key": (without("key"), "KeyError"),
    "no caption": (without("caption"), "KeyError"),
    "samples are text": (whole(samples="abc"), "damaged index"),
    "samples are a number": (whole(samples=7), "damaged index"),
    "samples are an object": (whole(samples={"a": 1}), "damaged index"),
    "a list": (lambda record: [record], "damaged index"),
    "null": (lambda record: None, "damaged index"),
    "a kind of object": (whole(kind={"a": []}), ""),
    "encoded": (whole(kind="encoded"), "payload"),
}


@pytest.mark.parametrize("case", CASES)
def test_index_files_that_lie_are_refused(tmp_path: Path, case: str) -> None:
    change, words = CASES[case]
    (path,) = indexed_shards(tmp_path / "made", [2])
    changed = change(index_record(path))
    Path(f"{path}.index.json").write_text(json.dumps(changed))
    if not words:
        assert len(build_index(str(path))) == 2
        return
    with pytest.raises(DataError, match=words) as seen:
        build_index(str(path))
    message = str(seen.value)
    assert "000.tar.index.json" in message and "Make it again" in message
    assert len(message) < 2000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95",
        b"no json",
        b'{"version": 1',
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"9" * 10**5,
        b"NaN",
        "\ud800".encode("utf-16", "surrogatepass"),
    ],
)
def test_index_files_that_are_none_are_refused(tmp_path: Path, data: bytes) -> None:
    (path,) = indexed_shards(tmp_path / "made", [2])
    Path(f"{path}.index.json").write_bytes(data)
    with pytest.raises(DataError, match=r"000\.tar\.index\.json: damaged index") as seen:
        build_index(str(path))
    assert len(str(seen.value)) < 2000


@pytest.mark.parametrize("replace", ["missing", "shrunk", "folder", "empty"])
def test_a_tar_that_changes_while_it_is_used(tmp_path: Path, replace: str) -> None:
    path, other = indexed_shards(tmp_path / "made", [2, 1])
    index = build_index([str(path), str(other)])
    data = path.read_bytes()
    path.unlink()
    if replace == "folder":
        path.mkdir()
    elif replace != "missing":
        path.write_bytes(data[:1100] if replace == "shrunk" else b"")
    for read in (index.read_image, index.read_caption):
        with pytest.raises(BadSampleError, match=r"000\.tar, key 's0001'") as seen:
            read(1)
        assert seen.value.kind == "unreadable"
    assert index.read_image(2) == picture(2)
    with pytest.raises(DataError, match=r"stale|no shard|is a folder"):
        build_index(str(path))
