"""What tools/inspect_data.py says about shards, good, odd and damaged."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from soar_mega.data.decode import check as decode_check
from soar_mega.data.decode import pil
from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.inspect import run as inspect_run
from soar_mega.data.inspect.report import as_json, table
from soar_mega.data.inspect.run import Summary, inspect, open_shards
from soar_mega.data.inspect.sheet import choose_samples, contact_sheet
from soar_mega.data.prepare.run import prepare
from soar_mega.data.shards.index import NO_CAPTION, ShardIndex, build_index, scan_shard
from soar_mega.data.shards.write_index import index_path
from tests.unit.test_data_index import picture, write_shards, write_tar
from tests.unit.test_data_prepare import photos
from tools import inspect_data

Members = list[tuple[str, bytes]]


def look_at(shards: object, **how: Any) -> Summary:
    return inspect(open_shards(str(shards)), **how)


def mixed(folder: Path) -> Path:
    """Two tars of odd samples; returns a pattern for both."""
    turned = Image.new("RGB", (30, 10), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    data = io.BytesIO()
    turned.save(data, "JPEG", exif=exif)
    a: Members = [("a.png", picture(0, (20, 10))), ("a.txt", b"four")]
    a += [("b.jpg", data.getvalue()), ("b.json", json.dumps({"caption": "sieben!"}).encode())]
    a += [("c.png", picture(1)), ("c.npy", b"x"), ("d.png", b"no picture"), ("d.txt", b"")]
    jpeg = picture(3, (64, 64), "JPEG")
    # Its header is whole: only decoding tells.
    b: Members = [("e.jpg", jpeg[:-4]), ("e.txt", b"xx"), ("f.txt", b"alone"), ("a.png", picture())]
    b += [("a.txt", b"\xff")]
    write_tar(folder / "0.tar", a)
    write_tar(folder / "1.tar", b)
    return folder / "*.tar"


MIXED_SIZES = [[20, 10], [10, 30], [16, 16], [0, 0], [64, 64], [16, 16]]


def kinds(summary: Summary) -> list[tuple[str, str]]:
    """(kind, shard and key) of what is bad."""
    return [(bad.kind, os.path.basename(bad.where)) for bad in summary.bad]


def test_counts(tmp_path: Path) -> None:
    summary = look_at(mixed(tmp_path))
    assert (summary.shards, summary.indexed, summary.samples) == (2, 0, 6)
    assert summary.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert summary.ignored == {"other extensions": 1, "captions without image": 1}
    assert summary.sizes_N2.tolist() == MIXED_SIZES
    assert summary.caption_lengths_N.tolist() == [4, 7, -1, 0, 2, -1]
    assert kinds(summary) == [
        ("no caption", "0.tar, key 'c'"),
        ("not an image", "0.tar, key 'd'"),
        ("caption not UTF-8", "1.tar, key 'a'"),
    ]
    assert not list(tmp_path.glob("*.json"))


def test_table_and_json(tmp_path: Path) -> None:
    summary = look_at(mixed(tmp_path), verify=True)
    text, record = table(summary), json.loads(json.dumps(as_json(summary)))
    for line in (
        "shards    2 (0 with an index)",
        "samples   6",
        "ignored   1 captions without image, 1 other extensions",
        "captions missing 2, empty 1",
        "1 truncated or damaged image",
    ):
        assert line in text
    rows = {line.split("  ")[0]: line.split()[-5:] for line in text.splitlines() if line}
    assert rows["width (pixels)"] == ["10", "10", "16", "64", "64"]
    assert rows["height (pixels)"] == ["10", "10", "16", "64", "64"]
    assert rows["caption (characters)"] == ["0", "0", "2", "7", "7"]
    assert record["width"] == [10, 10, 16, 64, 64] and record["short_side"][0] == 10
    assert {k: n for k, n in record["aspect_ratios"].items() if n} == {
        "under 1:2": 1,
        "about square": 3,
        "3:2 to 2:1": 1,
    }
    assert (record["sizes_unknown"], record["captions_missing"], record["captions_empty"]) == (
        1,
        2,
        1,
    )
    assert [bad["kind"] for bad in record["bad"]] == [bad.kind for bad in summary.bad]


def test_places_in_the_table_are_few_and_json_has_all(tmp_path: Path) -> None:
    members = [("a.png", picture()), ("a.txt", b"x")]
    members += [(f"b{n}.png", picture()) for n in range(8)]
    summary = look_at(write_tar(tmp_path / "t.tar", members), verify=True)
    text = table(summary)
    assert "8 no caption" in text and "key 'b4'" in text and "and 3 more" in text
    assert "key 'b5'" not in text
    assert len(as_json(summary)["bad"]) == 8


def test_verify_decodes_everything(tmp_path: Path) -> None:
    pattern = mixed(tmp_path)
    wanted = [
        ("no caption", "0.tar, key 'c'"),
        ("not an image", "0.tar, key 'd'"),
        ("truncated or damaged image", "1.tar, key 'e'"),
        ("caption not UTF-8", "1.tar, key 'a'"),
    ]
    assert kinds(look_at(pattern, verify=True)) == wanted
    look_at(pattern, write_missing=True)
    assert kinds(look_at(pattern, verify=True)) == wanted, "an index changes nothing"


def test_same_with_any_number_of_workers_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = mixed(tmp_path)
    one = as_json(look_at(pattern, verify=True))
    monkeypatch.setattr(inspect_run, "CHUNK", 2)
    backwards = inspect_run.run_parallel
    monkeypatch.setattr(inspect_run, "run_parallel", lambda *a: list(backwards(*a))[::-1])
    assert as_json(look_at(pattern, verify=True)) == one
    two = as_json(look_at(pattern, verify=True, write_missing=True, workers=2))
    assert two == one | {"written": two["written"]} and len(two["written"]) == 2
    again = as_json(look_at(pattern, verify=True))
    assert again == one | {"indexed": 2}


def test_written_index_says_what_the_tar_says(tmp_path: Path) -> None:
    pattern = str(mixed(tmp_path))
    scanned = build_index(pattern)
    summary = look_at(pattern, write_missing=True)
    assert summary.written == [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]
    index = build_index(pattern)
    for with_index, plain in zip(index.shards, scanned.shards, strict=True):
        assert with_index.keys == plain.keys and with_index.size == plain.size
        assert with_index.table[:, :5].tolist() == plain.table[:, :5].tolist()
        assert with_index.ignored == plain.ignored
    assert index.sizes().tolist() == MIXED_SIZES
    assert index.shards[0].table[2, 4] == NO_CAPTION
    assert index.read_caption(1) == "sieben!"
    again = look_at(pattern, write_missing=True)
    assert (again.indexed, again.written) == (2, [])
    assert again.sizes_N2.tolist() == summary.sizes_N2.tolist()
    assert again.ignored == summary.ignored


def test_written_index_is_that_of_preparation(tmp_path: Path) -> None:
    report = prepare([str(photos(tmp_path / "in", 5))], tmp_path / "out", samples_per_shard=3)
    before = [json.loads(index_path(path).read_bytes()) for path in report.shards]
    index_path(report.shards[1]).unlink()
    first = index_path(report.shards[0]).read_bytes()
    summary = look_at(tmp_path / "out" / "*.tar", write_missing=True)
    assert summary.written == [str(report.shards[1])]
    assert index_path(report.shards[0]).read_bytes() == first
    for sample in before[1]["samples"]:
        del sample["source"]  # what only preparation knows
    assert json.loads(index_path(report.shards[1]).read_bytes()) == before[1]


def test_sizes_come_from_the_index_where_there_is_one(tmp_path: Path) -> None:
    prepare([str(photos(tmp_path / "in", 2))], tmp_path / "out")
    path = tmp_path / "out" / "train-000000.tar"
    whole = path.read_bytes()
    blank = bytearray(whole)
    for sample in json.loads(index_path(path).read_bytes())["samples"]:
        at, size = sample["image"]
        blank[at : at + size] = bytes(size)
    path.write_bytes(blank)
    counted = look_at(path)
    assert counted.sizes_N2.tolist() == [[16, 16]] * 2 and counted.bad == []
    assert {kind for kind, _ in kinds(look_at(path, verify=True))} == {
        "bytes changed",
        "not an image",
    }


def change_index(path: Path, change: Any) -> None:
    record = json.loads(index_path(path).read_bytes())
    change(record["samples"])
    index_path(path).write_text(json.dumps(record))


def shorter(place: list[int]) -> list[int]:
    return [place[0], place[1] - 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[1].update(image=shorter(s[1]["image"])), ["differs", "changed"]),
        (lambda s: s[1].update(caption=shorter(s[1]["caption"])), ["differs"]),
        (lambda s: s[1].update(caption=None), ["differs", "no caption"]),
        (lambda s: s[1].update(width=17), ["differs"]),
        (lambda s: s[1].update(sha256="0" * 64), ["changed"]),
        (lambda s: s[1].update(key="other"), ["differs", "differs"]),
        (lambda s: s.pop(), ["differs"]),
    ],
)
def test_verify_compares_the_index_with_the_tar(
    tmp_path: Path, change: Any, words: list[str]
) -> None:
    prepare([str(photos(tmp_path / "in", 3))], tmp_path / "out")
    path = tmp_path / "out" / "train-000000.tar"
    assert look_at(path, verify=True).bad == []
    change_index(path, change)
    found = look_at(path, verify=True)
    assert len(found.bad) == len(words)
    for bad, word in zip(found.bad, words, strict=True):
        assert word in bad.kind and bad.where.startswith(str(path))


def test_unusable_and_cut_shards_are_told_and_the_rest_is_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, [2, 3])
    whole = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "002.tar").write_bytes(b"no tar " * 200)
    (tmp_path / "003.tar").write_bytes(whole[: 4 * 1024])
    pattern = str(tmp_path / "*.tar")
    summary = look_at(pattern)
    assert (summary.shards, summary.samples) == (3, 7)
    assert [bad.kind for bad in summary.bad] == ["unusable shard"]
    found = kinds(look_at(pattern, verify=True))
    assert found == [("unusable shard", "002.tar"), ("tar cut short", "003.tar")]
    look_at(str(tmp_path / "003.tar"), write_missing=True)
    assert kinds(look_at(pattern, verify=True)) == found
    with pytest.raises(DataError, match=r"no shard can be used:\n  .*002\.tar: not readable"):
        open_shards(str(tmp_path / "002.tar"))


def test_a_tar_damaged_behind_its_index_is_told(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    path = tmp_path / "000.tar"
    look_at(path, write_missing=True)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"s0001.png") + 148] ^= 0x7F  # the header's checksum
    path.write_bytes(damaged)
    assert look_at(path).bad == []
    assert kinds(look_at(path, verify=True)) == [("unusable tar", "000.tar")]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[1].update(image=[-1, 5]),
        lambda s: s[1].update(caption=[0, -5]),
        lambda s: s[1].update(image=[0, 10**9]),
        lambda s: s[1].update(height=-1),
        lambda s: s[1].update(key=s[0]["key"]),
        lambda s: s[1].update(caption_extension="pkl"),
        lambda s: s[1].pop("caption"),
    ],
)
def test_damaged_index_files_are_refused(tmp_path: Path, change: Any) -> None:
    path = write_shards(tmp_path, [2]) / "000.tar"
    look_at(path, write_missing=True)
    change_index(path, change)
    with pytest.raises(DataError, match=r"000\.tar\.index\.json: damaged index"):
        open_shards(str(path))


def encoded_shard(folder: Path) -> Path:
    members = [(f"{n}.{kind}", data) for n in "ab" for kind, data in (("bin", b"x"), ("txt", b"c"))]
    path = write_tar(folder / "e.tar", members)
    with tarfile.open(path) as tar:
        at = {info.name: [info.offset_data, info.size] for info in tar}
    samples = [
        {
            "key": n,
            "payload": at[f"{n}.bin"],
            "caption": at[f"{n}.txt"],
            "width": 64,
            "height": 32,
            "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",  # of x
        }
        for n in "ab"
    ]
    record = {"version": 1, "kind": "encoded", "size": path.stat().st_size, "samples": samples}
    index_path(path).write_text(json.dumps(record))
    return path


def test_encoded_shards_are_counted_and_their_bytes_verified(tmp_path: Path) -> None:
    path = encoded_shard(tmp_path)
    summary = look_at(path, verify=True)
    assert summary.encoded and summary.samples == 2 and summary.bad == []
    assert "encoded samples   2" in table(summary)
    assert summary.sizes_N2.tolist() == [[64, 32]] * 2
    change_index(path, lambda samples: samples[1].update(sha256="0" * 64))
    assert [bad.kind for bad in look_at(path, verify=True).bad] == ["bytes changed"]
    write_shards(tmp_path, [1])
    with pytest.raises(DataError, match="Name one kind"):
        open_shards(str(tmp_path / "*.tar"))


# --- the sheet ---------------------------------------------------------------------------------


def test_samples_are_chosen_by_seed_or_key(tmp_path: Path) -> None:
    write_shards(tmp_path, [10, 10])
    index = build_index(str(tmp_path / "*.tar"))
    first, second = (choose_samples(index, 5, seed=seed) for seed in (0, 1))
    assert first == choose_samples(index, 5, seed=0) != second
    assert first == sorted(set(first)) and len(first) == 5
    assert choose_samples(index, 100) == list(range(20))
    seen = Counter(n for seed in range(50) for n in choose_samples(index, 5, seed=seed))
    assert len(seen) == 20
    assert choose_samples(index, 5, keys=["s0012", "s0003"]) == [3, 12]
    with pytest.raises(DataError, match="--keys: no sample has the key 's99'"):
        choose_samples(index, 5, keys=["s0001", "s99"])
    for count in (0, 401):
        with pytest.raises(DataError, match=f"--samples={count}"):
            choose_samples(index, count)


def test_sheet_shows_pictures_captions_and_faults(tmp_path: Path) -> None:
    """Each sample has a cell of 268 x 370 pixels with the picture in its upper 256."""
    turned = Image.new("RGB", (400, 200), "red")
    turned.paste("blue", (200, 0, 400, 200))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown clockwise: red above, blue below
    data = io.BytesIO()
    turned.save(data, "PNG", exif=exif)
    members = [("a.png", data.getvalue()), ("a.txt", b"word " * 30 + b"w" * 500)]
    members += [("b.png", b"broken"), ("b.txt", b"x"), ("c.png", picture(0))]
    clear = io.BytesIO()
    Image.new("RGBA", (300, 300), (0, 0, 0, 0)).save(clear, "PNG")
    members += [("d.png", clear.getvalue()), ("d.txt", b"")]
    index = ShardIndex([scan_shard(str(write_tar(tmp_path / "t.tar", members)))])
    contact_sheet(index, [0, 1, 2, 3], tmp_path / "out.png")
    sheet = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert sheet.shape == (2 * 370 + 12, 2 * 268 + 12, 3)

    def cell(number: int) -> np.ndarray:
        top, left = 12 + number // 2 * 370, 12 + number % 2 * 268
        return sheet[top : top + 370, left : left + 268]

    assert cell(0)[10, 128].tolist() == [255, 0, 0] and cell(0)[245, 128].tolist() == [0, 0, 255]
    assert (cell(0)[10, 20] == 255).all(), "as narrow as it is high, not stretched"
    red = [(c[..., 0] > c[..., 1] + 80) & (c[..., 1] < 160) for c in map(cell, range(4))]
    assert red[1][:60].sum() > 50, "why it cannot be shown"
    assert red[2][260:].sum() > 50, "it has no caption"
    assert cell(2)[128, 128].tolist() == [0, 0, 0]
    assert (cell(3)[:256] == 255).all(), "transparency is white"

    def lines(number: int) -> int:
        inked = (cell(number)[258:350, :256] < 200).any(axis=(1, 2))
        return int(((inked[1:]) & (~inked[:-1])).sum()) + int(inked[0])

    assert lines(0) > lines(1) == 2  # caption and key
    assert (cell(0)[:, 257:266] == 255).all(), "a long caption stays in its cell"
    assert lines(0) == 5 and lines(3) == 2


def test_sheet_opens_no_picture_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pil, "MAX_PIXELS", 255)
    with pytest.raises(BadSampleError) as caught:
        decode_check.thumbnail(picture(), 64)  # of 256 pixels
    assert caught.value.kind == "too many pixels"


def test_sheet_of_encoded_shards_is_refused(tmp_path: Path) -> None:
    index = build_index(str(encoded_shard(tmp_path)))
    with pytest.raises(DataError, match="--sheet: these are encoded shards"):
        contact_sheet(index, [0], tmp_path / "out.png")


# --- the command -------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, [3, 2])
    pattern = str(tmp_path / "*.tar")
    sheet = str(tmp_path / "look.png")
    assert inspect_data.main([pattern, "--sheet", sheet, "--samples=2", "--workers=1"]) == 0
    assert "samples   5" in capsys.readouterr().out
    assert Image.open(sheet).width == 2 * 268 + 12 and Image.open(sheet).height == 370 + 12
    line = [pattern, "--verify", "--write-index", "--json", "--workers=1"]
    assert inspect_data.main(line) == 0
    assert json.loads(capsys.readouterr().out)["written"] == [
        str(tmp_path / "000.tar"),
        str(tmp_path / "001.tar"),
    ]
    assert inspect_data.main([pattern, "--verify", "--workers=1"]) == 0
    assert "verified: everything can be used" in capsys.readouterr().out
    assert os.access(inspect_data.__file__, os.X_OK)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = str(mixed(tmp_path))
    assert inspect_data.main([odd, "--workers=1"]) == 0
    assert inspect_data.main([odd, "--verify", "--workers=1"]) == 1
    (tmp_path / "2.tar").write_text("no tar")
    assert inspect_data.main([odd, "--workers=1"]) == 1
    assert "1 unusable shard" in capsys.readouterr().out
    for line, words in (
        ([str(tmp_path / "none.tar")], "SHARDS="),
        ([odd, "--workers=0"], "--workers=0"),
        ([odd, "--sheet", str(tmp_path / "no" / "x.png")], "no/x.png"),
        ([odd, "--sheet", str(tmp_path / "x.unknown")], ".unknown"),
    ):
        assert inspect_data.main(line) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ") and words in printed.err
