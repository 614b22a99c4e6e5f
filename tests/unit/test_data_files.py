"""Shards behind URLs and commands: found, indexed, fetched and read; what is refused, and how."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.prepare.sources import list_candidates
from soar_mega.data.shards import files as files_module
from soar_mega.data.shards.files import ShardFiles
from soar_mega.data.shards.index import build_index, check_cache
from soar_mega.data.shards.patterns import find_shards
from soar_mega.data.shards.remote import index_name, shard_name, shown
from tests.remote_shards import ShardServer, index_record, indexed_shards, shard_server
from tests.unit.test_data_index import picture

GENEROUS = 10**9


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    """Serves two shards of three samples and their indexes."""
    with shard_server() as server:
        for path in indexed_shards(tmp_path / "served", [3, 3]):
            for file in (path, Path(f"{path}.index.json")):
                server.files[f"/{file.name}"] = file.read_bytes()
        yield server


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ShardFiles]:
    files = ShardFiles(str(tmp_path / "cache"), GENEROUS, retries=2, retry_pause_s=0.05)
    yield files
    files.close()


def wait_until(happens: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happens():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_http_shards_are_those_on_disk(server: ShardServer, files: ShardFiles) -> None:
    index = build_index(server.url("/{000..001}.tar"), files=files)
    assert len(index) == 6
    for _ in range(2):
        for sample in range(6):
            assert index.read_image(sample) == picture(sample)
            assert index.read_caption(sample) == f"caption {sample}"
    assert server.gets == {f"/00{n}.tar{end}": 1 for n in (0, 1) for end in ("", ".index.json")}


def test_fsspec_shards_by_glob(tmp_path: Path, files: ShardFiles) -> None:
    from fsspec import filesystem

    memory = filesystem("memory")
    for path in indexed_shards(tmp_path / "made", [2, 2]):
        memory.pipe(f"/bucket/t/{path.name}", path.read_bytes())
        memory.pipe(f"/bucket/t/{path.name}.index.json", Path(f"{path}.index.json").read_bytes())
    index = build_index("memory://bucket/t/*.tar", files=files)
    assert [index.read_image(n) for n in range(4)] == [picture(n) for n in range(4)]
    assert find_shards("memory://bucket/{t,u}/000.tar") == [
        "memory://bucket/t/000.tar",
        "memory://bucket/u/000.tar",
    ]
    with pytest.raises(DataError, match="no shard matches 'memory://bucket/u"):
        find_shards("memory://bucket/u/*.tar")
    memory.pipe("/bucket/t/001.tar", b"shorter")
    with pytest.raises(DataError, match="stale"):
        build_index("memory://bucket/t/001.tar", files=files)


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    (path, _) = indexed_shards(tmp_path / "made", [1, 1])
    assert find_shards(f"file://{tmp_path}/made/00{{0..0}}.tar") == [str(path)]
    assert build_index(f"file://{path}").read_image(0) == picture(0)


@pytest.mark.parametrize("fault", ["503", "cut", "short", "long"])
def test_passing_faults_cost_retries_only(
    server: ShardServer, files: ShardFiles, fault: str
) -> None:
    index = build_index(server.url("/000.tar"), files=files)
    server.faults["/000.tar"] = [fault, fault]
    start = time.monotonic()
    assert index.read_image(1) == picture(1)
    assert time.monotonic() - start >= 0.05 + 0.1  # the pauses grow
    assert server.gets["/000.tar"] == 3


def test_a_slow_server_is_waited_for(server: ShardServer, files: ShardFiles) -> None:
    index = build_index(server.url("/000.tar"), files=files)
    server.faults["/000.tar"] = ["slow"]
    files.prefetch(shard.path for shard in index.shards)
    wait_until(lambda: server.running)
    server.gate.set()
    assert index.read_image(2) == picture(2)
    assert server.gets["/000.tar"] == 1


@pytest.mark.parametrize("fault", ["503", "cut", "short", "long"])
def test_lasting_faults_cost_the_samples(
    server: ShardServer, files: ShardFiles, fault: str, tmp_path: Path
) -> None:
    index = build_index(server.url("/{000,001}.tar"), files=files)
    server.faults["/000.tar"] = [fault] * 9
    for sample in (0, 1):
        with pytest.raises(BadSampleError, match=r"000\.tar, key 's000.*cannot be fetched") as seen:
            index.read_image(sample)
        assert seen.value.kind == "unreadable"
    assert server.gets["/000.tar"] == 3  # the second sample did not ask again
    assert index.read_image(3) == picture(3)
    assert [name for name in os.listdir(tmp_path / "cache") if "000.tar" in name] == []


def test_a_failed_shard_is_tried_again_later(
    server: ShardServer, files: ShardFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(server.url("/000.tar"), files=files)
    server.faults["/000.tar"] = ["503"] * 3
    for _ in range(2):
        with pytest.raises(BadSampleError):
            index.read_image(0)
    monkeypatch.setattr(files_module, "_FAILED_S", 0.0)
    assert index.read_image(0) == picture(0)


def test_what_is_not_there_is_not_asked_for_twice(server: ShardServer, files: ShardFiles) -> None:
    index = build_index(server.url("/000.tar"), files=files)
    del server.files["/000.tar"]
    with pytest.raises(BadSampleError, match="404"):
        index.read_image(0)
    assert server.gets["/000.tar"] == 1


def test_remote_shards_need_an_index(server: ShardServer, files: ShardFiles) -> None:
    del server.files["/001.tar.index.json"]
    with pytest.raises(DataError, match=r"no index beside it \(http.*/001\.tar\.index\.json\)"):
        build_index(server.url("/00{0..1}.tar"), files=files)
    assert server.gets["/001.tar"] == 0


def test_an_index_that_does_not_come_is_no_missing_index(
    server: ShardServer, files: ShardFiles
) -> None:
    server.faults["/000.tar.index.json"] = ["503"] * 3
    with pytest.raises(DataError, match=r"000\.tar\.index\.json: cannot be read: HTTP 503"):
        build_index(server.url("/000.tar"), files=files)
    server.faults["/000.tar.index.json"] = ["cut"] * 3
    with pytest.raises(DataError, match=r"cannot be read: connection cut, \d+ bytes missing"):
        build_index(server.url("/000.tar"), files=files)
    server.faults["/000.tar.index.json"] = ["cut"]
    assert len(build_index(server.url("/000.tar"), files=files)) == 3


def test_a_shard_that_is_gone_or_changed_is_refused_at_the_start(
    server: ShardServer, files: ShardFiles
) -> None:
    server.files["/000.tar"] += bytes(512)
    del server.files["/001.tar"]
    with pytest.raises(DataError, match=r"2 of 2.*\n.*000.*stale[\s\S]*001\.tar: .*HTTP 404"):
        build_index(server.url("/00{0..1}.tar"), files=files)


@pytest.mark.parametrize("local", [True, False])
def test_huge_index_files_are_not_read(
    server: ShardServer, files: ShardFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    local: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(files_module, "MAX_INDEX_BYTES", 100)
    path = str(tmp_path / "served" / "000.tar") if local else server.url("/000.tar")
    with pytest.raises(DataError, match=r"more than 100 bytes.*--samples-per-shard"):
        build_index(path, files=files)


def test_remote_shards_need_a_cache_folder(server: ShardServer) -> None:
    with pytest.raises(DataError, match=r"data\.cache_dir is not set"):
        build_index(server.url("/000.tar"))
    assert not server.gets


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("http://host/*.tar", "do not list.*braces"),
        ("https://host/train-[0-9].tar?key=1", "do not list.*braces"),
        ("http://[::1/a.tar", "Correct the URL"),
        ("nosuch://host/*.tar", "cannot be opened"),
        (["memory://a.tar", "memory://{a,b}.tar"], "names memory://a.tar 2 times"),
        ("memory://{a,b}{3..1}.tar", "names no shard"),
    ],
)
def test_patterns_that_cannot_be_are_refused(pattern: str | list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        find_shards(pattern)


def test_preparation_takes_local_tars_only() -> None:
    with pytest.raises(DataError, match=r"INPUT='s3://b/a\.tar': inputs must be local files"):
        list_candidates(["s3://b/a.tar"])


def test_a_query_is_no_glob_and_braces_expand() -> None:
    assert find_shards("http://[::1]:80/{a,b}/{0..1}.tar?sig=*") == [
        f"http://[::1]:80/{folder}/{n}.tar?sig=*" for folder in "ab" for n in "01"
    ]
    assert find_shards("pipe:ssh host cat {1..2}.tar | awk '{print $1}'") == [
        f"pipe:ssh host cat {n}.tar | awk '{{print $1}}'" for n in "12"
    ]


def test_unknown_schemes_and_missing_packages_are_named(files: ShardFiles) -> None:
    with pytest.raises(DataError, match=r"nosuch://a\.tar.*correct the URL"):
        build_index("nosuch://a.tar", files=files)


def test_name_and_password(server: ShardServer, files: ShardFiles) -> None:
    server.authorization = "Basic " + base64.b64encode(b"me:a b").decode()
    with pytest.raises(DataError, match="404"):
        files.size(server.url("/000.tar"))
    url = server.url("/000.tar").replace("//", "//me:a%20b@")
    assert build_index(url, files=files).read_image(0) == picture(0)


def test_secrets_stay_out_of_messages(server: ShardServer, files: ShardFiles) -> None:
    url = server.url("/000.tar?signature=SECRET").replace("//", "//user:SECRET@")
    assert index_name("https://h/a.tar?s=1") == "https://h/a.tar.index.json?s=1"
    assert shown("https://u:p@h:1/a.tar?s=1") == "https://h:1/a.tar"
    plain = server.url("/000.tar?signature=SECRET")
    index = build_index(plain, files=files)
    assert index.read_image(0) == picture(0)
    assert "SECRET" not in index.where(0)
    assert index.fingerprint() == build_index(server.url("/000.tar"), files=files).fingerprint()
    for broken in (plain.replace("000", "nosuch"), url.replace("000", "nosuch")):
        with pytest.raises(DataError) as seen:
            build_index([broken], setting="x", files=files)
        assert "SECRET" not in str(seen.value).partition("cannot be used")[2]


def test_commands_run_only_where_they_are_allowed(tmp_path: Path, files: ShardFiles) -> None:
    (path,) = indexed_shards(tmp_path / "made", [2])
    canary = tmp_path / "canary"
    command = f"pipe:touch {canary}; cat {path}"
    with pytest.raises(DataError, match=r"data\.allow_pipe = false"):
        build_index(command, files=files)
    for read in (files.size, files.read_index, lambda p: files.read(p, 0, 1)):
        with pytest.raises(DataError, match=r"data\.allow_pipe = false"):
            read(command)
    files.prefetch([command])
    files.close()
    assert not canary.exists()

    allowed = ShardFiles(str(tmp_path / "cache"), GENEROUS, allow_pipe=True, retries=0)
    index = build_index(command, files=allowed)
    assert canary.exists()
    assert [index.read_image(n) for n in range(2)] == [picture(n) for n in range(2)]


def test_commands_that_fail_or_give_too_little(tmp_path: Path) -> None:
    (path,) = indexed_shards(tmp_path / "made", [2])
    allowed = ShardFiles(str(tmp_path / "cache"), GENEROUS, allow_pipe=True, retries=0)
    with pytest.raises(DataError, match=r"cannot be read.*exit 3"):
        build_index("pipe:exit 3; cat a.tar", files=allowed)
    with pytest.raises(DataError, match=r"must name a file ending in \.tar"):
        build_index("pipe:cat a", files=allowed)
    data = path.read_bytes()
    for number, faulty in enumerate((data[:-1], data + b"x")):
        copy = tmp_path / f"{number}.tar"
        copy.write_bytes(faulty)
        Path(f"{copy}.index.json").write_text(json.dumps(index_record(path)))
        index = build_index(f"pipe:cat {copy}", files=allowed)
        with pytest.raises(BadSampleError, match=r"bytes came instead of"):
            index.read_image(0)


@pytest.mark.parametrize(
    ("path", "index", "name"),
    [
        ("s3://b/a.tar", "s3://b/a.tar.index.json", "a.tar"),
        ("pipe:aws s3 cp s3://b/x.tar -", "pipe:aws s3 cp s3://b/x.tar.index.json -", "x.tar"),
        ("pipe:tar.tar /a.tar", "pipe:tar.tar /a.tar.index.json", "a.tar"),
        ("/d/a.tar", "/d/a.tar.index.json", "a.tar"),
    ],
)
def test_where_an_index_lies(path: str, index: str, name: str) -> None:
    assert (index_name(path), shard_name(path)) == (index, name)


def test_prefetch_returns_at_once_and_a_few_at_a_time(
    server: ShardServer, files: ShardFiles, tmp_path: Path
) -> None:
    urls = [server.url(f"/{n}.tar") for n in range(9)]
    for number in range(9):
        server.files[f"/{number}.tar"] = bytes([number]) * 5000
        server.faults[f"/{number}.tar"] = ["slow"]
    start = time.monotonic()
    files.prefetch([str(tmp_path / "served" / "000.tar"), *urls, *urls])
    assert time.monotonic() - start < 1
    wait_until(lambda: server.running == 4)
    assert files._pool is not None
    assert files._pool._work_queue.qsize() == 5  # repeated wishes do not pile up
    time.sleep(0.1)
    assert server.running == 4
    server.gate.set()
    assert files.read(urls[8], 4999, 1) == b"\x08"
    wait_until(lambda: sum(server.gets.values()) == 9)
    files.close()
    assert set(server.gets.values()) == {1}


def test_close_ends_fetches(server: ShardServer, files: ShardFiles, tmp_path: Path) -> None:
    server.files["/big.tar"] = bytes(2**24)
    server.faults["/big.tar"] = ["slow"]
    files.prefetch([server.url("/big.tar")])
    wait_until(lambda: os.path.exists(tmp_path / "cache") and server.running)
    server.gate.set()
    files.close()
    with pytest.raises(BadSampleError, match="stopped"):
        files.read(server.url("/000.tar"), 0, 1)
    assert not [name for name in os.listdir(tmp_path / "cache") if name.endswith(".partial")]


def test_the_cache_must_hold_what_is_read_in_turns(
    server: ShardServer, tmp_path: Path, files: ShardFiles
) -> None:
    index = build_index(server.url("/00{0..1}.tar"), files=files)
    each = index.shards[0].size
    shards = [index.shards, index.shards * 3]  # two and six
    for held, window in [(8, None), (8, 9), (8, 3), (6, 2), (4, 1)]:
        check_cache(shards, window, ShardFiles(str(tmp_path), held * each))
        few = ShardFiles(str(tmp_path), held * each - 1)
        named = rf"data\.cache_gb.*data\.shuffle_shards = {window or 'null'} keeps up to {held} "
        with pytest.raises(DataError, match=named) as seen:
            check_cache(shards, window, few)
        assert str(held * each) in str(seen.value) and str(few.cache_bytes) in str(seen.value)
    local = build_index(str(tmp_path / "served" / "*.tar"))
    check_cache([local.shards], 9, ShardFiles())
