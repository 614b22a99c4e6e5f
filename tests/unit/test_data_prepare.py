"""Shards made of folders, tables and tars hold what was given, and say what was not usable."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import signal
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from soar_mega.data import processes
from soar_mega.data.decode import pil as decode
from soar_mega.data.errors import DataError
from soar_mega.data.prepare import check as prepare_check
from soar_mega.data.prepare import run as prepare_module
from soar_mega.data.prepare import write as prepare_write
from soar_mega.data.prepare.run import prepare
from soar_mega.data.prepare.write import key_of
from soar_mega.data.shards.index import MAX_CAPTION_BYTES, build_index
from soar_mega.data.shards.write_index import index_path
from tests.unit.test_data_index import picture, write_tar
from tools import prepare_data


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def photos(folder: Path, count: int) -> Path:
    """``count`` pictures with captions, in two folders."""
    for n in range(count):
        put(folder / str(n % 2) / f"p{n:02d}.png", picture(n))
        put(folder / str(n % 2) / f"p{n:02d}.txt", f" caption {n}\n")
    return folder


def samples(out: Path) -> list[tuple[str, bytes]]:
    """(caption, image bytes) as the trainer's index reads them."""
    index = build_index(str(out / "*.tar"))
    return [(index.read_caption(n), index.read_image(n)) for n in range(len(index))]


def expected(count: int) -> list[tuple[str, bytes]]:
    return [(f"caption {n}", picture(n)) for n in range(count)]


def refused(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


# --- inputs ------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    prepare([str(photos(tmp_path / "in", 5))], tmp_path / "out")
    order = [0, 2, 4, 1, 3]  # by path
    assert samples(tmp_path / "out") == [expected(5)[n] for n in order]
    assert refused(tmp_path / "out") == []


def test_tars_as_img2dataset_writes_them(tmp_path: Path) -> None:
    about = json.dumps({"caption": "of json", "url": "x"}).encode()
    members = [("0.jpg", picture(0)), ("0.txt", b"of txt"), ("0.json", about)]
    members += [("1.jpg", picture(1)), ("1.json", about), ("2.json", about), ("3.jpg", picture(3))]
    members += [("4.jpg", picture(4)), ("4.json", b'{"caption": null}'), ("0.npy", b"x")]
    write_tar(tmp_path / "b.tar", members)
    write_tar(tmp_path / "a.tar", [("0.jpg", picture(9)), ("0.txt", b"of a")])
    prepare([str(tmp_path / "*.tar")], tmp_path / "out")
    wanted = [("of a", picture(9)), ("of txt", picture(0)), ("of json", picture(1))]
    assert samples(tmp_path / "out") == wanted
    assert [(row["source"], row["reason"]) for row in refused(tmp_path / "out")] == [
        ("b.tar:2", "no image"),
        ("b.tar:3", "no caption"),
        ("b.tar:4", "no caption"),
        ("b.tar", "other file"),
    ]
    # PNG bytes called jpg are called png in the shard.
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        names = [name.rpartition(".")[2] for name in tar.getnames()]
    assert names == ["png", "txt"] * 3


def test_img2dataset_tars_with_their_tables_beside(tmp_path: Path) -> None:
    """As img2dataset 1.x writes 00000.tar: jpg, json, txt by key; _stats.json, .parquet beside."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    members: list[tuple[str, bytes]] = []
    for n in range(3):
        key = f"00000{n:04d}"
        about = {
            "caption": f"a photo, number {n}",
            "url": f"https://example.com/{n}.jpg",
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 16,
            "height": 16,
            "original_width": 32,
            "original_height": 32,
            "exif": "{}",
            "sha256": hashlib.sha256(picture(n)).hexdigest(),
        }
        members += [(f"{key}.jpg", picture(n, kind="JPEG"))]
        members += [(f"{key}.json", json.dumps(about, indent=4).encode())]
        if (
            n != 1
        ):  # without --caption_col there is no txt; the json may have a caption all the same
            members += [(f"{key}.txt", about["caption"].encode())]  # type: ignore[attr-defined]
    write_tar(folder / "00000.tar", members)
    put(folder / "00000_stats.json", json.dumps({"count": 3, "successes": 3}))
    put(folder / "00000.parquet", b"PAR1")
    report = prepare([str(folder / "*.tar")], tmp_path / "out")
    wanted = [(f"a photo, number {n}", picture(n, kind="JPEG")) for n in range(3)]
    assert samples(tmp_path / "out") == wanted and not report.refused
    # --output_format files: the same members in a folder.
    for name, data in members:
        put(tmp_path / "loose" / "00000" / name, data)
    put(tmp_path / "loose" / "00000_stats.json", "{}")
    report = prepare([str(tmp_path / "loose")], tmp_path / "out2")
    assert samples(tmp_path / "out2") == wanted
    assert refused(tmp_path / "out2") == [
        {"source": "00000_stats.json", "reason": "other file", "detail": ""}
    ]
    # Trained on as they are.
    index = build_index(str(folder / "*.tar"))
    assert [index.read_caption(n) for n in range(3)] == [caption for caption, _ in wanted]


def test_tars_are_taken_by_path_however_they_are_named(tmp_path: Path) -> None:
    for n, name in enumerate(("a", "b", "c")):
        write_tar(tmp_path / f"{name}.tar", [("0.png", picture(n)), ("0.txt", b"caption %d" % n)])
    names = [str(tmp_path / f"{name}.tar") for name in "cab"]
    prepare(names, tmp_path / "out")
    assert samples(tmp_path / "out") == expected(3)
    report = prepare(sorted(names), tmp_path / "out")
    assert report.written == 0, "the same input"


# --- what is refused ---------------------------------------------------------------------------


def test_refusals_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 400)
    monkeypatch.setattr(prepare_check, "MAX_IMAGE_BYTES", 10_000)
    jpeg = picture(3, kind="JPEG")
    gif = picture(1, kind="GIF")
    long = "é" * (MAX_CAPTION_BYTES // 2)
    cases: dict[str, tuple[bytes, bytes | None, str]] = {
        "bare": (jpeg, None, "no caption"),
        "big": (picture(0, (21, 20)), b"c", "too many pixels"),
        "blank": (jpeg, b"\xef\xbb\xbf \n", "no caption"),
        "cut": (picture(3)[:-24], b"c", "truncated or damaged image"),
        "empty": (b"", b"c", "not an image"),
        "gif": (gif, b"c", "not an image"),
        "heavy": (jpeg + bytes(10_000), b"c", "too many bytes"),
        "latin": (jpeg, b"caf\xe9", "caption not UTF-8"),
        "long": (jpeg, (long + "x").encode(), "caption too long"),
        "text": (b"no picture", b"c", "not an image"),
        # Its header is whole: only decoding tells.
        "torn": (jpeg[:-4], b"c", "truncated or damaged image"),
    }
    for name, (image, caption, _) in cases.items():
        put(tmp_path / "in" / f"{name}.jpg", image)
        if caption is not None:
            put(tmp_path / "in" / f"{name}.txt", caption)
    put(tmp_path / "in" / "just.jpg", picture(0, (20, 20)))
    put(tmp_path / "in" / "just.txt", long)
    put(tmp_path / "in" / "lonely.txt", "c")
    put(tmp_path / "in" / "notes.md", "c")
    photos(tmp_path / "elsewhere", 1)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    report = prepare([str(tmp_path / "in")], tmp_path / "out")
    found = {row["source"]: row["reason"] for row in refused(tmp_path / "out")}
    assert found == {
        **{f"{name}.jpg": kind for name, (_, _, kind) in cases.items()},
        "lonely.txt": "no image",
        "notes.md": "other file",
        "link": "other file",
    }
    assert report.refused == Counter(found.values())
    assert "14 refused" in str(report) and "3 not an image" in str(report)
    assert samples(tmp_path / "out") == [(long, picture(0, (20, 20)))]


def test_the_pixel_limit_is_the_decoders(tmp_path: Path) -> None:
    side = 2**13 + 1  # a header that claims this, without the pixels
    raw = bytearray(picture())
    raw[16:24] = side.to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    put(tmp_path / "in" / "a.png", bytes(raw))
    put(tmp_path / "in" / "a.txt", "c")
    with pytest.raises(DataError, match="none of 1 candidates"):
        prepare([str(tmp_path / "in")], tmp_path / "out")
    assert [row["reason"] for row in refused(tmp_path / "out")] == ["too many pixels"]


# --- the shards --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(10, 4, [3, 3, 4]), (8, 4, [4, 4]), (9, 8, [4, 5]), (3, 100, [3]), (3, 1, [1, 1, 1])],
)
def test_balance(tmp_path: Path, count: int, most: int, sizes: list[int]) -> None:
    report = prepare(
        [str(photos(tmp_path / "in", count))], tmp_path / "out", prefix="v", samples_per_shard=most
    )
    assert [path.name for path in report.shards] == [f"v-{n:06d}.tar" for n in range(len(sizes))]
    shards = build_index(list(map(str, report.shards))).shards
    assert [len(shard.keys) for shard in shards] == sizes
    # Unique in all shards.
    numbers = [int(key.partition("-")[0]) for shard in shards for key in shard.keys]
    assert numbers == list(range(count))
    assert Counter(samples(tmp_path / "out")) == Counter(expected(count))


def test_keys_are_unique_and_safe(tmp_path: Path) -> None:
    names = ["a.b.c", "../a", "ä/ö", " x" * 100, "", "a"]
    made = [key_of(n, name) for n, name in enumerate(names)]
    assert made[:2] == ["00000000-a_b_c", "00000001-_a"]
    for key in made:
        assert len(key) < 95 and key.isascii() and not set(key) & set("./ ")
    for folder in ("x", "y"):
        put(tmp_path / "in" / folder / "same.v1.png", picture(3))
        put(tmp_path / "in" / folder / "same.v1.txt", "c")
    prepare([str(tmp_path / "in")], tmp_path / "out")
    (shard,) = build_index(str(tmp_path / "out" / "*.tar")).shards
    assert shard.keys == ["00000000-same_v1", "00000001-same_v1"]


def test_index_tells_the_truth(tmp_path: Path) -> None:
    photos(tmp_path / "in", 5)
    turned = Image.new("RGB", (30, 10), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    data = io.BytesIO()
    turned.save(data, "JPEG", exif=exif)
    put(tmp_path / "in" / "turned.jpg", data.getvalue())
    put(tmp_path / "in" / "turned.txt", "on its side")
    report = prepare([str(tmp_path / "in")], tmp_path / "out", samples_per_shard=4)
    rows: list[dict[str, Any]] = []
    for path in report.shards:
        whole = path.read_bytes()
        index = json.loads(index_path(path).read_text())
        assert (index["shard"], index["size"]) == (path.name, len(whole))
        (scanned,) = build_index(str(path)).shards
        assert [row["key"] for row in index["samples"]] == scanned.keys
        for row in index["samples"]:
            at, size = row["image"]
            image = whole[at : at + size]
            assert hashlib.sha256(image).hexdigest() == row["sha256"]
            assert image == (tmp_path / "in" / row["source"]).read_bytes()
            at, size = row["caption"]
            text = (tmp_path / "in" / row["source"]).with_suffix(".txt").read_text().strip()
            assert whole[at : at + size].decode() == text
        rows += index["samples"]
    assert [(row["width"], row["height"]) for row in rows] == [(16, 16)] * 5 + [(10, 30)]


# --- going on ----------------------------------------------------------------------------------


def test_same_bytes_whoever_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "in", 9)
    put(tmp_path / "in" / "bad.png", b"")
    prepare([str(tmp_path / "in")], tmp_path / "one", samples_per_shard=2)
    monkeypatch.setattr(prepare_module, "CHUNK", 3)
    os.rename(tmp_path / "in", tmp_path / "moved")
    prepare([str(tmp_path / "moved")], tmp_path / "two", samples_per_shard=2, workers=2)
    assert len(contents(tmp_path / "one")) == 5 * 2 + 2
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(DataError, match=r"--workers=2: a worker was killed"):
        list(processes.run_parallel(signal.raise_signal, [signal.SIGKILL] * 2, 2, ""))


def test_two_runs_may_not_write_to_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = str(photos(tmp_path / "in", 2)), tmp_path / "out"
    real, inside = prepare_module._make_plan, []

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(DataError, match=r"--out=.*another run is writing to it"):
            prepare([folder], out)
        inside.append((out / ".lock").exists())
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_make_plan", meanwhile)
        prepare([folder], out)
    assert inside == [True] and not (out / ".lock").exists()
    assert len(samples(out)) == 2
    (out / ".lock").touch()  # as a killed run leaves it
    assert prepare([folder], out).written == 0
    assert not (out / ".lock").exists()


def test_a_lock_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        real(file, how)
        taken.append(how)
        if len(taken) == 1:
            (tmp_path / ".lock").unlink()  # another run ended between open and flock
        if len(taken) == 2:
            (tmp_path / ".lock").unlink()
            (tmp_path / ".lock").touch()  # and a third has begun

    monkeypatch.setattr(fcntl, "flock", late)
    with prepare_module._alone(tmp_path):
        assert len(taken) == 3 and (tmp_path / ".lock").exists()


class Stopped(BaseException):
    pass


class Renames:
    """os.replace, counted; the one after ``allowed`` stops the run."""

    def __init__(self, allowed: int = 1000) -> None:
        self.allowed, self.done, self.real = allowed, 0, os.replace

    def __call__(self, old: Any, new: Any) -> None:
        if self.done == self.allowed:
            raise Stopped
        self.done += 1
        self.real(old, new)


# 3 chunks, refused.jsonl and plan.json, 3 shards with their indexes; what is left to rename.
@pytest.mark.parametrize(
    ("stop", "left"),
    [*enumerate([11, 10, 9, 8, 8]), *enumerate([6, 6, 4, 4, 2, 2], 5)],
)
def test_goes_on_from_every_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, left: int
) -> None:
    folder, out = str(photos(tmp_path / "in", 5)), tmp_path / "out"
    monkeypatch.setattr(prepare_module, "CHUNK", 2)
    prepare([folder], tmp_path / "whole", samples_per_shard=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(os, "replace", Renames(stop))
        prepare([folder], out, samples_per_shard=2)
    assert len(list(out.rglob(".*.partial"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", renames := Renames())
        report = prepare([folder], out, samples_per_shard=2)
    assert renames.done == left
    assert (report.samples, report.written) == (5, min(left // 2, 3))
    assert contents(out) == contents(tmp_path / "whole")


def test_checks_of_another_input_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    put(tmp_path / "first" / "a.png", b"")  # refused, unlike what has its place in the other input
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(os, "replace", Renames(1))
        prepare([str(tmp_path / "first")], out)
    assert [path.name for path in out.glob(".checked/*.json")] == ["000000000.json"]
    prepare([str(photos(tmp_path / "second", 3))], out)
    assert Counter(samples(out)) == Counter(expected(3))
    assert sorted(path.name for path in out.iterdir()) == [
        "plan.json",
        "refused.jsonl",
        "train-000000.tar",
        "train-000000.tar.index.json",
    ]


def test_what_is_complete_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "in", 6)
    arguments: dict[str, Any] = {"out": tmp_path / "out", "samples_per_shard": 2}
    prepare([str(tmp_path / "in")], **arguments)
    whole = contents(tmp_path / "out")
    cut = tmp_path / "out" / "train-000001.tar"
    cut.write_bytes(cut.read_bytes()[:-1])
    index_path(tmp_path / "out" / "train-000002.tar").unlink()
    written: list[str] = []
    real = prepare_write.write_shard

    def noting(job: prepare_write.ShardJob) -> int:
        written.append(job.path.name)
        return real(job)

    monkeypatch.setattr(prepare_module, "write_shard", noting)
    monkeypatch.setattr(prepare_module, "check", None)  # the plan stands
    assert prepare([str(tmp_path / "in")], **arguments).written == 2
    assert written == ["train-000001.tar", "train-000002.tar"]
    assert contents(tmp_path / "out") == whole


def test_another_plan_is_refused(tmp_path: Path) -> None:
    folder, out = str(photos(tmp_path / "in", 4)), tmp_path / "out"
    prepare([folder], out)
    before = contents(out)
    for other in ({"samples_per_shard": 2}, {"prefix": "other"}):
        with pytest.raises(DataError, match=r"plan\.json is of another input"):
            prepare([folder], out, **other)  # type: ignore[arg-type]
    photos(tmp_path / "in", 5)
    with pytest.raises(DataError, match=r"plan\.json is of another input"):
        prepare([folder], out)
    assert contents(out) == before
    (out / "plan.json").unlink()
    with pytest.raises(DataError, match=r"no plan\.json"):
        prepare([folder], out)


@pytest.mark.parametrize("name", ["p00.png", "p00.txt"])
def test_input_that_changed_after_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    photos(tmp_path / "in", 2)
    changed = tmp_path / "in" / "0" / name
    make_plan = prepare_module._make_plan

    def meddling(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        changed.write_bytes(changed.read_bytes().swapcase())
        return plan

    monkeypatch.setattr(prepare_module, "_make_plan", meddling)
    with pytest.raises(DataError, match=r"0/p00\.png: its image or caption has changed"):
        prepare([str(tmp_path / "in")], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


# --- settings ----------------------------------------------------------------------------------


def test_of_a_tar_cut_short_the_whole_samples_are_taken(tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", data) for n in "abc" for kind, data in [("png", picture()), ("txt", b"x")]
    ]
    tar = write_tar(tmp_path / "t.tar", members)
    tar.write_bytes(tar.read_bytes()[: 5 * 1024 - 100])  # a member is a header and a block of data
    prepare([str(tar)], tmp_path / "out")
    index = build_index(str(tmp_path / "out" / "*.tar"))
    assert len(index) == 2
    refused = (tmp_path / "out" / "refused.jsonl").read_text()
    assert "tar cut short" in refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--samples-per-shard", "0"], "--samples-per-shard=0: must be at least 1"),
        (["--samples-per-shard", "50001"], "--samples-per-shard=50001: at most 50000"),
        (["--workers", "0"], "--workers=0"),
        (["--prefix", "a/b"], "--prefix='a/b'"),
        (["--out", "in/shards"], "lies in the input"),
        (["--out", "other/../in/shards"], "lies in the input"),
        (["no.txt"], "INPUT='no.txt'"),
        (["none.jsonl"], "none.jsonl"),
        (["none*.tar"], "none*.tar"),
        (["bare.csv"], "no column caption"),
        (["cut.tar"], "cut.tar"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(Path("in"), 1)
    put(Path("bare.csv"), "image,title\na,b\n")
    put(Path("cut.tar"), write_tar(Path("t.tar"), [("a.png", picture())]).read_bytes()[:300])
    where = [] if "--out" in settings else ["--out", "out"]
    assert prepare_data.main([*settings, "in", *where]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and message in printed.err


def test_the_command_prints_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos(tmp_path / "in", 3)
    put(tmp_path / "in" / "x.png", b"")
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--samples-per-shard=2"]
    assert prepare_data.main([*arguments, "--workers=1"]) == 0
    printed = capsys.readouterr().out
    assert "3 samples in 2 shards (2 new)" in printed and "1 no caption" in printed
    assert os.access(prepare_data.__file__, os.X_OK)
