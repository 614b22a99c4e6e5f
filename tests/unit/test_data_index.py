"""Which samples the index finds, and what it says about shards it cannot use."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.index import ShardIndex, build_index, scan_shard
from soar_mega.data.shards.patterns import find_shards
from soar_mega.data.shards.scan import CUT


def picture(number: int = 0, size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    """An encoded picture of one colour that depends on ``number``."""
    out = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar with these members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: Sequence[int], captions: int = 1000) -> Path:
    """Shards ``NNN.tar`` of so many samples; every ``captions`` samples the captions repeat."""
    number = 0
    for shard, count in enumerate(counts):
        members: list[tuple[str, bytes]] = []
        for _ in range(count):
            members.append((f"s{number:04d}.png", picture(number)))
            members.append((f"s{number:04d}.txt", f"caption {number % captions}\n".encode()))
            number += 1
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def keys(index: ShardIndex) -> list[str]:
    return [index.key(sample) for sample in range(len(index))]


def test_samples_in_shard_order_with_their_bytes(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 2, 4])
    index = build_index(str(tmp_path / "*.tar"), num_threads=3)
    assert keys(index) == [f"s{n:04d}" for n in range(9)]
    for sample in range(9):
        assert index.read_image(sample) == picture(sample)
        assert index.read_caption(sample) == f"caption {sample}"
    assert "001.tar" in index.where(4) and "'s0004'" in index.where(4)
    for outside in (-1, 9):
        with pytest.raises(IndexError):
            index.read_caption(outside)


def test_members_may_be_apart_in_folders_and_upper_case(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("./x/a.JPG", picture(1, kind="JPEG")),
            ("x/b.webp", picture(2, kind="WEBP")),
            ("x/b.json", json.dumps({"caption": " zwei ü "}).encode()),
            ("x/a.txt", b"eins"),
            ("x/a.json", b'{"caption": "not this one"}'),
            ("x/a.cls", b"7"),
        ],
    )
    index = build_index(str(path))
    assert keys(index) == ["x/a", "x/b"]
    assert [index.read_caption(s) for s in range(2)] == ["eins", "zwei ü"]
    assert index.ignored() == {"other extensions": 1}


def test_patterns(tmp_path: Path) -> None:
    for name in ("t-008", "t-009", "t-010", "u-1", "u-2", "odd{1}[x]"):
        write_tar(tmp_path / f"{name}.tar", [])

    def names(*patterns: str) -> list[str]:
        return [Path(p).stem for p in find_shards([str(tmp_path / p) for p in patterns])]

    assert names("t-{008..010}.tar") == ["t-008", "t-009", "t-010"]
    assert names("u-{1..2}.tar") == ["u-1", "u-2"]
    assert names("{u-1,t-*}.tar") == ["u-1", "t-008", "t-009", "t-010"]
    assert names("{t-00{9,8},u-1}.tar") == ["t-009", "t-008", "u-1"]
    assert names("u-*.tar", "t-009.tar") == ["u-1", "u-2", "t-009"]
    assert names("odd{1}[x].tar") == ["odd{1}[x]"]


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ("{tmp}/none-*.tar", "no shard matches"),
        ("{tmp}/000.tarr", "no shard matches"),
        (["{tmp}/000.tar", "{tmp}/none.tar"], "no shard matches"),
        ("{tmp}", "is a folder"),
        (["{tmp}/000.tar", "{tmp}/*.tar"], r"names .*000\.tar 2 times"),
        ([], "names no shard"),
        ("", "no shard matches"),
        ("{tmp}/00{3..1}.tar", "names no shard"),
    ],
)
def test_what_matches_nothing_is_named(tmp_path: Path, shards: object, words: str) -> None:
    write_shards(tmp_path, [1])
    fill = str(tmp_path)
    named = (
        shards.replace("{tmp}", fill)
        if isinstance(shards, str)
        else [s.replace("{tmp}", fill) for s in shards]  # type: ignore[attr-defined]
    )
    with pytest.raises(DataError, match=rf"^validation\.shards=.*{words}"):
        build_index(named, setting="validation.shards")


def test_samples_without_caption_keep_their_place(tmp_path: Path) -> None:
    good = [("a.png", picture()), ("a.txt", b"x")]
    write_tar(tmp_path / "0.tar", [*good, ("b.png", picture()), ("b.json", b'{"text": "x"}')])
    write_tar(
        tmp_path / "1.tar", [("c.png", picture()), *good, ("d.png", picture()), ("d.txt", b"\xff")]
    )
    index = build_index(str(tmp_path / "*.tar"))
    assert keys(index) == ["a", "b", "c", "a", "d"]
    kinds = {1: "no caption", 2: "no caption", 4: "caption not UTF-8"}
    for sample in range(5):
        if sample not in kinds:
            assert index.read_caption(sample) == "x"
            continue
        with pytest.raises(BadSampleError, match=rf"tar, key '{index.key(sample)}'") as caught:
            index.read_caption(sample)
        assert caught.value.kind == kinds[sample]


def test_a_shard_without_any_caption_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("b.png", picture()), ("c.png", picture())])
    with pytest.raises(
        DataError, match=r"0\.tar: none of its 2 samples has a caption \(first: 'b'"
    ):
        build_index(str(tmp_path / "*.tar"))


@pytest.mark.parametrize(
    ("second", "words"),
    [("a.png", r"both \.png and \.png"), ("a.jpg", r"both \.png and \.jpg")],
)
def test_duplicate_keys_are_refused(tmp_path: Path, second: str, words: str) -> None:
    members = [("a.png", picture()), ("a.txt", b"x"), (second, picture())]
    with pytest.raises(DataError, match=words):
        scan_shard(str(write_tar(tmp_path / "a.tar", members)))


def test_links_devices_and_odd_names_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [("a.png", picture()), ("a.txt", b"x")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in [
            ("l.png", tarfile.SYMTYPE),
            ("h.png", tarfile.LNKTYPE),
            ("d.png", tarfile.CHRTYPE),
            ("f.png", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../x.png", "/abs.png", ".hidden.png", "a\nb.png", "x//y.png", "run.pkl"):
            tar.addfile(tarfile.TarInfo(name))
    shard = scan_shard(str(path))
    assert shard.keys == ["a"]
    assert shard.ignored["links, devices and sparse files"] == 4
    assert shard.ignored["odd names"] == 5
    assert shard.ignored["other extensions"] == 1


def test_a_cut_tar_loses_its_tail_and_says_so(tmp_path: Path) -> None:
    whole = (write_shards(tmp_path, [3]) / "000.tar").read_bytes()
    used = len(whole.rstrip(b"\0"))
    end = -(-used // 512) * 512
    cut = tmp_path / "cut.tar"
    counts = []
    for length in [0, 1, 511, 512, *range(600, end, 487), end, end + 511]:
        cut.write_bytes(whole[:length])
        try:
            shard = scan_shard(str(cut))
        except DataError as error:  # nothing whole before the cut
            assert "cut.tar" in str(error)
            counts.append(0)
            continue
        assert shard.ignored[CUT] == 1
        good = [n for n in range(len(shard.keys)) if shard.table[n, 4] >= 0]
        counts.append(len(good))
        index = ShardIndex([shard])
        for n in good:
            assert (index.read_image(n), index.read_caption(n)) == (picture(n), f"caption {n}")
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3}
    cut.write_bytes(whole[: end + 512])
    assert not scan_shard(str(cut)).ignored


def test_damaged_header_and_joined_archives_are_noticed(tmp_path: Path) -> None:
    whole = (write_shards(tmp_path, [2]) / "000.tar").read_bytes()
    damaged = bytearray(whole)
    second = damaged.index(b"s0001.png")
    damaged[second + 148] ^= 0x7F  # the header's checksum
    (tmp_path / "bad.tar").write_bytes(damaged)
    with pytest.raises(DataError, match="starts no member header"):
        scan_shard(str(tmp_path / "bad.tar"))
    (tmp_path / "two.tar").write_bytes(whole + whole)
    with pytest.raises(DataError, match="joined with cat"):
        scan_shard(str(tmp_path / "two.tar"))


def test_huge_extended_header_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(DataError, match="limit"):
        scan_shard(str(path))


def test_unreadable_compressed_and_empty(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar " * 200)
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    for name in ("text.tar", "gz.tar"):
        with pytest.raises(DataError, match=f"{name}: not readable as an uncompressed tar"):
            build_index(str(tmp_path / name))
    with pytest.raises(DataError, match="hold no sample"):
        build_index(str(write_tar(tmp_path / "empty.tar", [])))
    with pytest.raises(DataError, match=r"odd\.tar: no sample in it \(1 other extensions\)"):
        build_index(str(write_tar(tmp_path / "odd.tar", [("a.b.png", b"")])))


def test_all_bad_shards_are_reported_at_once(tmp_path: Path) -> None:
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", [("a.png", picture())])
    with pytest.raises(DataError, match=r"8 of 8 shards[\s\S]*4\.tar[\s\S]*and 3 more"):
        build_index(str(tmp_path / "*.tar"))


def test_a_shard_that_shrinks_after_the_scan_is_an_error(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [2]) / "000.tar"
    index = build_index(str(path))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(
        BadSampleError, match=r"000\.tar, key 's0001'.*changed after it was scanned"
    ):
        index.read_image(1)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        index.read_image(1)


def test_fingerprint_follows_names_sizes_and_keys_but_not_the_folder(tmp_path: Path) -> None:
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for folder in (a, b, c):
        folder.mkdir()
        write_shards(folder, [2, 2])
    write_tar(c / "001.tar", [("s0002.png", picture(2)), ("s0002.txt", b"caption 2\n")])
    prints = [build_index(str(f / "*.tar")).fingerprint() for f in (a, b, c)]
    assert prints[0] == prints[1] != prints[2]
    backwards = build_index([str(a / "001.tar"), str(a / "000.tar")]).fingerprint()
    assert backwards != prints[0]
