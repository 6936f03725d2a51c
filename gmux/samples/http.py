"""The HTTP target: tells what it received, and has paths for the ways in which an answer can be framed.

    /bytes/N        N bytes, with Content-Length       /echo           the body as it came
    /chunked/N      the same, in chunks                /sleep/TIME     an answer after TIME (0.5, 500ms; 60s at most)
    /close/N        the same, ended by closing         /status/CODE    an answer with that status, 200 to 599

Every other path, whatever the method, is answered by JSON about the request. gevent's `pywsgi` speaks the HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from types import TracebackType
from typing import Any

import gevent
from gevent.pywsgi import WSGIHandler, WSGIServer

from gmux import net
from gmux.kinds import parse_seconds
from gmux.samples.target import Target

StartResponse = Callable[[str, list[tuple[str, str]]], Any]

BLOCK_SIZE = 64 * 1024

#: A body up to this size is shown as text, in bytes.
MAX_TEXT = 1024

#: A body up to this size is sent back by /echo, which holds it in memory: as much as gmux takes by default.
MAX_ECHO = 16 * 1024 * 1024

MAX_SLEEP = 60.0

#: RFC 9110 section 15: these have no content.
EMPTY_STATUS = (204, 205, 304)

PATH_WITH_SIZE = re.compile(r"/(bytes|chunked|close)/([0-9]{1,12})")
PATH_WITH_TIME = re.compile(r"/sleep/([0-9.]+[a-z]*)")
PATH_WITH_CODE = re.compile(r"/status/([2-5][0-9]{2})")

BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class HttpTarget(Target, WSGIServer):  # type: ignore[misc]
    protocol = "http"

    def __init__(
        self,
        address: net.Address,
        max_connections: int = 1,
        delay: float = 0.0,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        # With a name given, pywsgi asks no name service for its own.
        names = {"SERVER_NAME": "sample"}
        super().__init__(
            address, max_connections, delay, report, log=None, error_log=None, environ=names, handler_class=Handler
        )
        self.requests = 0

    def converse(self, sock: Any, address: Any) -> None:
        WSGIServer.handle(self, sock, address)

    def application(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI application; switches greenlets."""
        self.requests += 1
        handler: Handler = environ["sample.handler"]
        path = environ["PATH_INFO"]
        # Not environ["wsgi.input"]: with an Upgrade field that is the connection, which has no end.
        body = Body(handler.wsgi_input, MAX_ECHO if path == "/echo" else MAX_TEXT)
        self.work()
        if path == "/echo":
            return self._echo(environ, body, start_response)
        if found := PATH_WITH_SIZE.fullmatch(path):
            return self._numbered(environ, found[1], int(found[2]), start_response)
        if found := PATH_WITH_TIME.fullmatch(path):
            return self._sleep(found[1], start_response)
        if found := PATH_WITH_CODE.fullmatch(path):
            return answer_text(int(found[1]), start_response)
        return self._describe(handler, body, start_response)

    def _describe(self, handler: Handler, body: Body, start_response: StartResponse) -> Iterable[bytes]:
        description = {
            "method": handler.command,
            "path": handler.path,
            "headers": [f"{name}: {value}" for name, value in handler.headers.items()],
            "body": body.describe(),
            "connection": handler.number,
            "request_on_connection": handler.requests,
            "request": self.requests,
        }
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(description, indent=2).encode() + b"\n"]

    def _echo(self, environ: dict[str, Any], body: Body, start_response: StartResponse) -> Iterable[bytes]:
        if body.is_cut:
            return answer_text(413, start_response)
        start_response("200 OK", [("Content-Type", environ.get("CONTENT_TYPE", "application/octet-stream"))])
        return [body.beginning]

    def _numbered(
        self, environ: dict[str, Any], framing: str, size: int, start_response: StartResponse
    ) -> Iterable[bytes]:
        headers = [("Content-Type", "text/plain")]
        if framing == "bytes":
            headers.append(("Content-Length", str(size)))
        elif framing == "close" or environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            headers.append(("Connection", "close"))
        start_response("200 OK", headers)
        return numbered_lines(size)

    def _sleep(self, time: str, start_response: StartResponse) -> Iterable[bytes]:
        try:
            seconds = parse_seconds(time)
        except ValueError:
            return answer_text(400, start_response)
        if seconds > MAX_SLEEP:
            return answer_text(400, start_response)
        gevent.sleep(seconds)
        return answer_text(200, start_response)


class Handler(WSGIHandler):  # type: ignore[misc]
    """pywsgi's side of one connection, made by the target for each, with what pywsgi leaves to the application."""

    response_use_chunked: bool

    def __init__(self, sock: Any, address: Any, target: HttpTarget) -> None:
        super().__init__(sock, address, target)
        self.number = target.served
        self.requests = 0

    def get_environ(self) -> dict[str, Any]:
        self.requests += 1
        # WSGI's own names for the fields lose their order, their repetitions and their spelling.
        return {**super().get_environ(), "sample.handler": self}

    def write(self, data: bytes) -> None:
        super().write(b"" if self.command == "HEAD" else data)

    def finalize_headers(self) -> None:
        super().finalize_headers()
        if not self.response_use_chunked:
            return
        if (b"Connection", b"close") in self.response_headers:
            self.response_headers.remove((b"Transfer-Encoding", b"chunked"))
            self.response_use_chunked = False
        elif self.command == "HEAD":
            # RFC 9112 section 6.1: the field may stay; the last chunk would be content.
            self.response_use_chunked = False

    def handle_error(self, kind: type[BaseException], error: BaseException, traceback: TracebackType) -> None:
        # pywsgi takes a body that breaks off and a chunk without a size for errors of the application.
        if issubclass(kind, (OSError, ValueError)):
            self.close_connection = True
        else:
            super().handle_error(kind, error, traceback)

    def _handle_client_error(self, error: Exception) -> tuple[str, bytes]:
        # pywsgi's hook prints a traceback for some heads (101 fields, `HTTP/1`), which are the peer's errors too.
        return "400", BAD_REQUEST


class Body:
    """The body of a request, read to its end when made, which switches greenlets: its size, its hash, its beginning."""

    def __init__(self, stream: Any, max_held: int) -> None:
        held = bytearray()
        sha256 = hashlib.sha256()
        self.size = 0
        while piece := stream.read(BLOCK_SIZE):
            self.size += len(piece)
            sha256.update(piece)
            held += piece[: max_held - len(held)]
        self.sha256 = sha256.hexdigest()
        self.beginning = bytes(held)

    @property
    def is_cut(self) -> bool:
        return self.size > len(self.beginning)

    def describe(self) -> dict[str, Any]:
        """For JSON: the length in bytes and the hash, and the text when the body is short and UTF-8."""
        description: dict[str, Any] = {"length": self.size, "sha256": self.sha256}
        if self.size and not self.is_cut:
            with suppress(UnicodeDecodeError):
                description["text"] = self.beginning.decode()
        return description


def answer_text(code: int, start_response: StartResponse) -> Iterable[bytes]:
    """An answer that is its status, in words where there are any."""
    try:
        phrase = HTTPStatus(code).phrase
    except ValueError:
        phrase = "Unknown"
    if code in EMPTY_STATUS:
        start_response(f"{code} {phrase}", [])
        return []
    start_response(f"{code} {phrase}", [("Content-Type", "text/plain")])
    return [f"{code} {phrase}\n".encode()]


def numbered_lines(size: int) -> Iterator[bytes]:
    """`size` bytes in blocks: lines of 8 bytes, numbered from 0 and again after each block, so a shift shows."""
    block = _block()
    while size >= BLOCK_SIZE:
        yield block
        size -= BLOCK_SIZE
    if size:
        yield block[:size]


@cache
def _block() -> bytes:
    return b"".join(b"%07d\n" % number for number in range(BLOCK_SIZE // 8))
