"""A Hugging Face hub on this machine: serves one folder as one model at one commit, and counts."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "somebody/tiny-sd3"
PAUSE_S = 0.3


class FakeHub:
    """Attributes:
    refuses: (status, the hub's error code) to answer with instead of files; None: serves them.
    requests: How often each "METHOD path" was asked for.
    tokens: Those that came with requests.
    """

    def __init__(self, folder: Path, refuses: tuple[int, str] | None = None) -> None:
        self.folder, self.refuses = folder, refuses
        self.requests: Counter[str] = Counter()
        self.tokens: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *rest: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, text: str) -> int:
        """Requests whose method and path contain ``text``."""
        return sum(number for line, number in self.requests.items() if text in line)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests[f"{request.command} {path}"] += 1
        self.tokens.add(request.headers.get("Authorization", ""))
        if path == f"/api/models/{NAME}/tree/{COMMIT}":
            time.sleep(PAUSE_S)  # so that others come meanwhile
            if self.refuses is None or self.refuses[1] == "GatedRepo":  # gated ones list files
                self._send(request, 200, json.dumps(self._tree()).encode())
                return
        elif self.refuses is None and path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            file = self.folder / path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
            if file.is_file():
                self._send(request, 200, file.read_bytes(), etag=_oid(file))
                return
        status, code = self.refuses or (404, "EntryNotFound")
        self._send(request, status, b"{}", code=code)

    def _tree(self) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": file.relative_to(self.folder).as_posix(),
                "size": file.stat().st_size,
                "oid": _oid(file),
            }
            for file in sorted(self.folder.rglob("*"))
            if file.is_file()
        ]

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        etag: str = "",
        code: str = "",
    ) -> None:
        request.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, "Retry-After": "0"}
        headers |= {"ETag": f'"{etag}"'} if etag else {}
        headers |= {"X-Error-Code": code} if code else {}
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
