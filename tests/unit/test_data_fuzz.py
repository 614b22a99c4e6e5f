"""Thousands of damaged tars and index files: each is used, or refused as bad data; nothing else
comes out, nothing hangs, and memory stays bounded."""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.shards.index import build_index
from tests.remote_shards import index_record
from tests.unit.test_data_index import picture

MEMORY_KIB = 64 * 1024
TOKENS = [b"-1", b"1e999", b"9" * 30, b"null", b"[", b"{", b'"', b"\\u0000", b"\0", b"\xff" * 8]


def seeds(folder: Path) -> list[tuple[bytes, bytes]]:
    """Tars of each format with long names, links and a sparse member, and their indexes."""
    made = []
    for number, kind in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = folder / f"{number}.tar"
        long = "x" * 90 if kind == tarfile.USTAR_FORMAT else "x" * 150 + "ü"
        with tarfile.open(path, "w", format=kind) as tar:
            for n in range(4):
                members = {
                    f"d/{n}{long if n == 2 else ''}.png": picture(n),
                    f"d/{n}{long if n == 2 else ''}.txt": b"caption",
                    f"j{n}.jpg": picture(n, kind="JPEG"),
                    f"j{n}.json": json.dumps({"caption": "c" * n}).encode(),
                }
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    if kind == tarfile.PAX_FORMAT and n == 3:
                        info.pax_headers = {"GNU.sparse.map": "0,1", "comment": "x"}
                    tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("l.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        made.append((path.read_bytes(), json.dumps(index_record(path)).encode()))
    return made


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a few changes; headers, where they bite, more often than the rest."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        if not out:
            break
        place = draw.randrange(len(out))
        if draw.random() < 0.6:
            place = min(place // 512 * 512 + draw.choice((100, 124, 136, 148, 156, 257, 345, 386)),
                        len(out) - 1)  # fmt: skip
        change = draw.randrange(7)
        if change == 0:
            out[place] ^= 1 << draw.randrange(8)
        elif change == 1:
            del out[place:]
        elif change == 2:
            del out[place : place + draw.choice((1, 7, 512))]
        elif change == 3:
            out[place:place] = draw.randbytes(draw.choice((1, 512)))
        elif change == 4:
            token = draw.choice(TOKENS)
            out[place : place + len(token)] = token
        elif change == 5:
            block = place // 512 * 512
            out[block:block] = out[block : block + 512 * draw.choice((1, 2))]
        else:
            fix_checksum(out, place // 512 * 512, draw)
    return bytes(out)


def fix_checksum(out: bytearray, block: int, draw: random.Random) -> None:
    """Another type or size in a header that still adds up."""
    header = out[block : block + 512]
    if len(header) < 512 or header[257:262] != b"ustar":
        return
    if draw.random() < 0.5:
        header[156] = draw.choice(b"0123456789xgLKSD\0z")
    else:
        size = draw.choice((0, 1, 511, 2**20, 2**33, -1, -512))
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    out[block : block + 512] = header


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(path: Path) -> str:
    """What became of one shard."""
    try:
        index = build_index(str(path), num_threads=1)
    except DataError as error:
        assert not isinstance(error, BadSampleError)
        assert path.name in str(error) and len(str(error)) < 3000
        return "refused"
    bad = 0
    for sample in range(len(index)):
        for read in (index.read_image, index.read_caption):
            try:
                read(sample)
            except BadSampleError as error:
                assert path.name in str(error) and len(str(error)) < 3000
                bad += 1
    return "bad samples" if bad else "used"


@pytest.mark.parametrize(
    "count", [600, pytest.param(5000, marks=pytest.mark.full)], ids=["some", "many"]
)
def test_damaged_shards(tmp_path: Path, count: int) -> None:
    draw = random.Random(count)
    whole = seeds(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    path, index_path = work / "f.tar", work / "f.tar.index.json"
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        tar, index = draw.choice(whole)
        where = draw.randrange(3)  # 0: tar without index, 1: tar, 2: index
        path.write_bytes(tar if where == 2 else mutated(tar, draw))
        index_path.unlink(missing_ok=True)
        if where:
            index_path.write_bytes(index if where == 1 else mutated(index, draw))
        try:
            with time_limit(10):
                outcomes[f"{'tar' if where < 2 else 'index'} {outcome(path)}"] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of {count}, left in {work}") from error
        assert sorted(p.name for p in work.iterdir()) in (["f.tar"], ["f.tar", "f.tar.index.json"])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEMORY_KIB
    # The damage is neither too little nor too much to say something.
    for kind in ("tar used", "tar bad samples", "tar refused", "index used", "index refused"):
        assert outcomes[kind] >= count // 100, outcomes
