"""The standard library's server as a target: `http_server VERSION`, on a port of its own.

It has the routes that all targets here have. Every answer says in X-Peer which connection it came on, and in X-Open how
many there are.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from threading import Lock

FILES = Path(os.environ.get("PEER_FILES", "."))
ETAGS = {"/small": '"0"', "/large": '"1"'}


class Handler(BaseHTTPRequestHandler):
    server: CountingServer

    def answer(self, status: int, body: bytes = b"", **fields: str) -> None:
        self.send_response(status)
        self.send_header("X-Peer", str(self.client_address[1]))
        self.send_header("X-Open", str(self.server.open))
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        if status not in (204, 304):
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        etag = ETAGS.get(path)
        if etag is not None and self.headers["If-None-Match"] == etag:
            self.answer(304, ETag=etag)
        elif etag is not None:
            self.answer(200, (FILES / path[1:]).read_bytes(), ETag=etag)
        elif path == "/gzip":
            text = (FILES / "text").read_bytes()
            if "gzip" in self.headers.get("Accept-Encoding", ""):
                self.answer(200, gzip.compress(text, mtime=0), Content_Encoding="gzip", Vary="Accept-Encoding")
            else:
                self.answer(200, text, Vary="Accept-Encoding")
        elif path == "/none":
            self.answer(204)
        elif path == "/moved":
            self.answer(302, Location="/small")
        elif path == "/fields":
            self.answer(200, **{f"X_F{n}": f"value {n}" for n in range(60)})
        elif path == "/tell":
            told = {"method": self.command, "target": self.path, "fields": self.headers.items()}
            self.answer(200, json.dumps(told).encode())
        elif path.startswith("/token/"):
            self.answer(200, path.encode())
        else:
            self.answer(404, b"not here\n")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(200, self.rfile.read(int(self.headers.get("Content-Length", 0))), X_Method=self.command)

    do_PUT = do_DELETE = do_POST

    def log_message(self, *args: object) -> None:
        pass


class CountingServer(ThreadingHTTPServer):
    """Counts a connection until just before it is closed: a proxy that waits for that is not accused of two."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.open = 0
        self._lock = Lock()

    def process_request(self, request: socket, client_address: tuple[str, int]) -> None:
        with self._lock:
            self.open += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket) -> None:
        with self._lock:
            self.open -= 1
        super().shutdown_request(request)


if __name__ == "__main__":
    Handler.protocol_version = sys.argv[1]
    CountingServer().serve_forever()
