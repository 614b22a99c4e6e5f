"""Shards with indexes, and an HTTP server on this machine that misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from soar_mega.data.shards.index import scan_shard
from soar_mega.data.shards.index_file import INDEX_VERSION
from tests.unit.test_data_index import write_shards


def index_record(tar: Path) -> dict[str, object]:
    """What the index file of a tar says."""
    shard = scan_shard(str(tar))
    samples = [
        {"key": key, "image": row[:2], "caption": row[2:4], "width": 16, "height": 16}
        for key, row in zip(shard.keys, shard.table.tolist(), strict=True)
    ]
    return {"version": INDEX_VERSION, "size": shard.size, "samples": samples}


def indexed_shards(folder: Path, counts: list[int]) -> list[Path]:
    """Shards ``000.tar``, ... of so many samples, each with its index beside it."""
    folder.mkdir(exist_ok=True)
    write_shards(folder, counts)
    paths = [folder / f"{number:03d}.tar" for number in range(len(counts))]
    for path in paths:
        Path(f"{path}.index.json").write_text(json.dumps(index_record(path)))
    return paths


class ShardServer(ThreadingHTTPServer):
    """Serves files from memory.

    Attributes:
        files: By path, such as ``/a.tar``.
        faults: By path, what the next whole GETs of it meet, one each: ``503``, ``cut`` (the
            connection ends half-way), ``short`` and ``long`` (another length), ``slow`` (half of
            it trickles, the rest waits for ``gate``).
        gets: Whole GETs so far, by path; looks at the length are not counted.
        running: How many of them are being answered.
        authorization: The header that requests must have; 404 for the others.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.gets: Counter[str] = Counter()
        self.running = 0
        self.authorization: str | None = None
        self.gate = threading.Event()
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer

    def do_GET(self) -> None:
        server, path = self.server, urlsplit(self.path).path
        data = server.files.get(path)
        look = self.headers.get("Range") == "bytes=0-0"
        if data is None or self.headers.get("Authorization") != server.authorization:
            server.gets[path] += not look
            self.send_error(404)
            return
        if look:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-0/{len(data)}")
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(data[:1])
            return
        with server.lock:
            server.gets[path] += 1
            server.running += 1
            fault = server.faults[path].pop(0) if server.faults[path] else ""
        try:
            self._answer(data, fault)
        finally:
            with server.lock:
                server.running -= 1

    def _answer(self, data: bytes, fault: str) -> None:
        if fault == "503":
            self.send_error(503)
            return
        data = {"short": data[:-1], "long": data + b"x"}.get(fault, data)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            return
        sent, step = 0, len(data) // 40 + 1
        while fault == "slow" and sent < len(data) // 2 and not self.server.gate.wait(0.01):
            self.wfile.write(data[sent : sent + step])
            sent += step
        if fault == "slow":
            self.server.gate.wait(60)
        self.wfile.write(data[sent:])

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@contextmanager
def shard_server() -> Iterator[ShardServer]:
    with ShardServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.gate.set()
            server.shutdown()
            thread.join()
