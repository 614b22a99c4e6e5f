"""The cache of remote shards under several processes: fetched once, bounded, and what a killed
process leaves does no harm."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards import cache as cache_module
from soar_mega.data.shards.cache import ShardCache
from soar_mega.data.shards.files import ShardFiles
from tests.remote_shards import ShardServer, shard_server
from tests.unit.test_data_files import wait_until

SIZE = 50_000
# Reads one byte in the middle of each shard and prints what it finds.
READER = f"""
import sys
from soar_mega.data.shards.files import ShardFiles
folder, limit, *urls = sys.argv[1:]
files = ShardFiles(folder, int(limit), retries=0)
sys.stdin.readline()
for url in urls:
    print(files.read(url, {SIZE} // 2, 1)[0], flush=True)
"""


@pytest.fixture
def server() -> Iterator[ShardServer]:
    """Serves 12 shards of ``SIZE`` bytes; all bytes of a shard are its number."""
    with shard_server() as server:
        for number in range(12):
            server.files[f"/{number}.tar"] = bytes([number]) * SIZE
        yield server


def start_reader(folder: Path, limit: int, urls: Sequence[str]) -> subprocess.Popen[str]:
    """A process that waits for a line, then reads."""
    return subprocess.Popen(
        [sys.executable, "-c", READER, str(folder), str(limit), *urls],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def output(process: subprocess.Popen[str]) -> list[int]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return [int(line) for line in out.split()]


def names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != "soar.lock")


def used(folder: Path) -> int:
    """What the cache takes up while nobody makes room."""
    with ShardCache(str(folder), 0)._alone():
        return sum(os.stat(folder / name).st_size for name in names(folder))


def test_processes_fetch_each_shard_once(server: ShardServer, tmp_path: Path) -> None:
    urls = [server.url(f"/{number}.tar") for number in range(3)]
    for number in range(3):
        server.faults[f"/{number}.tar"] = ["slow"]  # so that all wait for the same one
    readers = [start_reader(tmp_path, 3 * SIZE, urls) for _ in range(4)]
    for reader in readers:
        go(reader)
    wait_until(lambda: server.running)
    time.sleep(0.3)
    server.gate.set()
    assert [output(reader) for reader in readers] == [[0, 1, 2]] * 4
    assert server.gets == {f"/{number}.tar": 1 for number in range(3)}
    assert len(names(tmp_path)) == 3


def test_the_bound_holds_while_processes_evict(server: ShardServer, tmp_path: Path) -> None:
    limit = 4 * SIZE + SIZE // 2
    orders = [random.Random(seed).sample(range(12), 12) for seed in range(3)]
    readers = [
        start_reader(tmp_path, limit, [server.url(f"/{number}.tar") for number in order])
        for order in orders
    ]
    for reader in readers:
        go(reader)
    seen = []
    while any(reader.poll() is None for reader in readers):
        if (tmp_path / "soar.lock").exists():
            seen.append(used(tmp_path))
        time.sleep(0.002)
    assert [output(reader) for reader in readers] == orders
    assert sum(server.gets.values()) >= 12
    assert max(seen) <= limit
    assert used(tmp_path) == 4 * SIZE


def test_a_fetch_waits_for_room_that_others_take_up(server: ShardServer, tmp_path: Path) -> None:
    server.faults["/0.tar"] = ["slow"]
    files = ShardFiles(str(tmp_path), SIZE + SIZE // 2)
    threads = [
        threading.Thread(target=files.read, args=(server.url(f"/{number}.tar"), 0, 1))
        for number in (0, 1)
    ]
    threads[0].start()
    wait_until(lambda: server.running)
    assert used(tmp_path) == SIZE  # all that it will take up
    threads[1].start()
    time.sleep(0.3)
    assert server.gets["/1.tar"] == 0
    server.gate.set()
    for thread in threads:
        thread.join(60)
    assert server.gets["/1.tar"] == 1
    assert names(tmp_path) == [
        os.path.basename(ShardCache(str(tmp_path), 0).path(server.url("/1.tar")))
    ]


def test_a_lock_is_of_the_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "x.partial")
    flock, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not calls:
            os.replace(path, tmp_path / "x")  # whoever had it finished in between
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    file = cache_module._lock(path, threading.Event())
    assert file is not None and os.path.sameopenfile(file, os.open(path, os.O_RDONLY))
    assert len(calls) == 2
    os.close(file)


def test_a_killed_fetch_is_taken_over_and_cleaned_up(server: ShardServer, tmp_path: Path) -> None:
    limit, urls = 2**24, [server.url(f"/{number}.tar") for number in (0, 1, 2)]
    for number in (0, 1):
        server.files[f"/{number}.tar"] = bytes([number]) * 2**20
        server.faults[f"/{number}.tar"] = ["slow"]
    files = ShardFiles(str(tmp_path), limit, retries=0)
    for url, size in zip(urls, (2**20, 2**20, SIZE), strict=True):
        files.expect(url, size)
    victims = [start_reader(tmp_path, limit, [url]) for url in urls[:2]]
    for victim in victims:
        go(victim)
    partial = [f"{ShardCache(str(tmp_path), 0).path(url)}.partial" for url in urls[:2]]
    wait_until(lambda: all(os.path.exists(p) and os.stat(p).st_blocks for p in partial))
    waiting = threading.Thread(target=files.read, args=(urls[0], 0, 1))
    waiting.start()  # for the first victim
    time.sleep(0.2)
    assert server.gets["/0.tar"] == 1
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(60) == -signal.SIGKILL
    waiting.join(60)
    assert server.gets["/0.tar"] == 2
    assert files.read(urls[0], 0, 2**20) == bytes(2**20)
    assert files.read(urls[2], 0, 1) == b"\x02"
    kept = [os.path.basename(ShardCache(str(tmp_path), 0).path(urls[n])) for n in (0, 2)]
    assert names(tmp_path) == sorted(kept)  # no partial file of the second victim
    assert files.read(urls[1], 2**20 - 1, 1) == b"\x01"


def test_the_least_recently_used_goes(server: ShardServer, tmp_path: Path) -> None:
    urls = [server.url(f"/{number}.tar") for number in range(3)]
    files = ShardFiles(str(tmp_path), 2 * SIZE)
    (tmp_path / "mine.tar").write_bytes(bytes(9 * SIZE))
    cache = ShardCache(str(tmp_path), 2 * SIZE)
    for age, url in ((300, urls[0]), (200, urls[1])):
        files.read(url, 0, 1)
        then = time.time() - age
        os.utime(cache.path(url), (then, then))
    files.read(urls[0], 0, 1)
    files.read(urls[2], 0, 1)
    assert sorted(server.gets.values()) == [1, 1, 1]
    kept = [os.path.basename(cache.path(urls[n])) for n in (0, 2)]
    assert names(tmp_path) == sorted(["mine.tar", *kept])


def test_what_is_open_stays_readable_and_what_is_gone_comes_back(
    server: ShardServer, tmp_path: Path
) -> None:
    urls = [server.url(f"/{number}.tar") for number in range(2)]
    cache = ShardCache(str(tmp_path), SIZE)
    first = cache.open(urls[0], SIZE, threading.Event())
    os.close(cache.open(urls[1], SIZE, threading.Event()))
    assert names(tmp_path) == [os.path.basename(cache.path(urls[1]))]
    assert os.pread(first, SIZE, 0) == bytes(SIZE)
    os.close(first)
    assert ShardFiles(str(tmp_path), SIZE).read(urls[0], 9, 1) == b"\0"
    assert server.gets["/0.tar"] == 2


@pytest.mark.parametrize("change", [-1, 1])
def test_a_copy_of_another_length_is_fetched_again(
    server: ShardServer, tmp_path: Path, change: int
) -> None:
    url = server.url("/1.tar")
    files = ShardFiles(str(tmp_path), 2 * SIZE)
    files.read(url, 0, 1)
    os.truncate(ShardCache(str(tmp_path), 0).path(url), SIZE + change)
    assert files.read(url, SIZE - 1, 1) == b"\x01"
    assert server.gets["/1.tar"] == 2
    assert used(tmp_path) == SIZE


def test_a_shard_larger_than_the_cache(server: ShardServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{SIZE} bytes.*data\.cache_gb.*Raise"):
        ShardFiles(str(tmp_path), SIZE - 1).read(server.url("/0.tar"), 0, 1)
    assert not server.gets and not os.listdir(tmp_path)


def test_a_full_disk_ends_the_run_and_leaves_nothing(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, bytes(data)[:100], offset)

    monkeypatch.setattr(os, "pwrite", full)
    files = ShardFiles(str(tmp_path), 2 * SIZE)
    with pytest.raises(
        DataError, match=r"data\.cache_dir=.*bytes are free.*data\.cache_gb"
    ) as seen:
        files.read(server.url("/1.tar"), 0, 1)
    assert not isinstance(seen.value, BadSampleError)
    assert names(tmp_path) == []
    monkeypatch.undo()
    assert files.read(server.url("/1.tar"), 0, 1) == b"\x01"


def test_a_folder_that_cannot_be_used_is_named(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir='.*file/cache'.*Name a folder"):
        ShardFiles(str(tmp_path / "file" / "cache"), SIZE).read(server.url("/1.tar"), 0, 1)
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    cache = ShardCache(str(tmp_path), 9 * SIZE)
    for name in (cache.path(server.url("/1.tar")), cache.path(server.url("/2.tar")) + ".partial"):
        os.symlink(outside, name)  # nobody is led astray
    for number in (1, 2):
        with pytest.raises(DataError, match=r"data\.cache_dir="):
            ShardFiles(str(tmp_path), 9 * SIZE).read(server.url(f"/{number}.tar"), 0, 1)
    assert outside.read_bytes() == b"precious"


def test_names_are_safe_and_differ_by_url(tmp_path: Path) -> None:
    urls = [
        "s3://a/x.tar",
        "s3://b/x.tar",
        "https://h/x.tar?version=1",
        "https://h/x.tar?version=2",
        "s3://a/.. /ü\n.tar",
        "pipe:cat /../x.tar; rm -r $HOME",
        "s3://a/" + "x" * 500 + ".tar",
    ]
    paths = [Path(ShardCache(str(tmp_path), 0).path(url)) for url in urls]
    assert len(set(paths)) == len(urls)
    for path in paths:
        assert path.parent == tmp_path and len(path.name) < 200
        assert set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
