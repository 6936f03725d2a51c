"""The routes of all targets as a WSGI application, for gunicorn. See `http_server`."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FILES = Path(os.environ.get("PEER_FILES", "."))
ETAGS = {"/small": '"0"', "/large": '"1"'}

Answer = tuple[str, dict[str, str], bytes]


def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    status, fields, body = route(environ)
    if not status.startswith(("204", "304")):
        fields |= {"Content-Type": "text/plain", "Content-Length": str(len(body))}
    start(status, [("X-Peer", environ.get("REMOTE_PORT", "")), *fields.items()])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def route(environ: dict[str, Any]) -> Answer:
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    if method in ("POST", "PUT", "DELETE"):
        return "200 OK", {"X-Method": method}, environ["wsgi.input"].read()
    if path in ETAGS:
        fields = {"ETag": ETAGS[path]}
        if environ.get("HTTP_IF_NONE_MATCH") == ETAGS[path]:
            return "304 Not Modified", fields, b""
        return "200 OK", fields, (FILES / path[1:]).read_bytes()
    if path == "/gzip":
        text = (FILES / "text").read_bytes()
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            return "200 OK", {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}, gzip.compress(text, mtime=0)
        return "200 OK", {"Vary": "Accept-Encoding"}, text
    if path == "/none":
        return "204 No Content", {}, b""
    if path == "/moved":
        return "302 Found", {"Location": "/small"}, b""
    if path == "/fields":
        return "200 OK", {f"X-F{n}": f"value {n}" for n in range(60)}, b""
    if path == "/tell":
        given = {
            name[5:].replace("_", "-").title(): value for name, value in environ.items() if name.startswith("HTTP_")
        }
        told = {"method": method, "target": environ["RAW_URI"], "fields": sorted(given.items())}
        return "200 OK", {}, json.dumps(told).encode()
    if path.startswith("/token/"):
        return "200 OK", {}, path.encode()
    return "404 Not Found", {}, b"not here\n"
