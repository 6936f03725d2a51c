"""What an HTTP client is told when gmux must answer itself: a status, which limit or peer was met, in text or JSON."""

from __future__ import annotations

import json
import re

from gmux.codecs import _http_head
from gmux.codecs._http_request import HttpRequest
from gmux.codecs.base import Refusal
from gmux.errors import (
    AnswerTimeout,
    BadAnswer,
    ConnectError,
    ExchangeError,
    ExpectationFailed,
    FramingError,
    HeadTooLarge,
    MessageTooLarge,
    Overloaded,
    QueueTimeout,
    RequestTimeout,
    TargetNameTooLong,
    Unsupported,
    UpstreamClosed,
    VersionUnsupported,
)

#: Seconds after which a client that was turned away may try again.
RETRY_AFTER = 1

STATUS: dict[type[ExchangeError], tuple[int, str]] = {
    FramingError: (400, "Bad Request"),
    RequestTimeout: (408, "Request Timeout"),
    MessageTooLarge: (413, "Content Too Large"),
    TargetNameTooLong: (414, "URI Too Long"),
    ExpectationFailed: (417, "Expectation Failed"),
    HeadTooLarge: (431, "Request Header Fields Too Large"),
    Unsupported: (501, "Not Implemented"),
    ConnectError: (502, "Bad Gateway"),
    UpstreamClosed: (502, "Bad Gateway"),
    BadAnswer: (502, "Bad Gateway"),
    Overloaded: (503, "Service Unavailable"),
    QueueTimeout: (503, "Service Unavailable"),
    AnswerTimeout: (504, "Gateway Timeout"),
    VersionUnsupported: (505, "HTTP Version Not Supported"),
}

TEXT = b"text/plain"
PROBLEM = b"application/problem+json"

#: What is sent to a client that accepts a type or a range of types (RFC 9110 section 12.5.1).
_OFFERS = {
    TEXT: TEXT,
    b"text/*": TEXT,
    b"*/*": TEXT,
    b"application/json": b"application/json",
    PROBLEM: PROBLEM,
    b"application/*": PROBLEM,
}

_ACCEPT = re.compile(rb"\r\naccept:([^\r]*)", re.IGNORECASE)
_WEIGHT = re.compile(rb"(?i:q)=([01](?:\.[0-9]{0,3})?)")


def refuse(error: ExchangeError, request: HttpRequest | None) -> Refusal:
    """The answer to `request`, as far as that is known."""
    status, title = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    # A request that was not read to its end leaves its rest on the connection, so the connection ends.
    close = request is None or request.close
    kind = TEXT if request is None else best_type(request.data.partition(_http_head.END)[0])
    body = _text(error) if kind == TEXT else _problem(error, status, title)
    lines = [
        f"HTTP/1.1 {status} {title}".encode(),
        b"Server: gmux",
        b"Content-Type: " + kind + (b"; charset=utf-8" if kind == TEXT else b""),
        b"Content-Length: %d" % len(body),
    ]
    if status == 503:
        lines.append(b"Retry-After: %d" % RETRY_AFTER)
    if close:
        lines.append(b"Connection: close")
    elif request is not None and not request.minor_version:
        lines.append(b"Connection: keep-alive")
    if request is not None and request.method == b"HEAD":
        body = b""
    return Refusal(b"\r\n".join(lines) + _http_head.END + body, close)


def best_type(head: bytes) -> bytes:
    """The media type for a client whose request has this head; of equal ones its first, and text for want of any."""
    best, best_weight = TEXT, 0.0
    for value in _ACCEPT.findall(head):
        for element in value.split(b","):
            name, _, parameters = element.partition(b";")
            offer = _OFFERS.get(name.strip(b" \t").lower())
            weight = _WEIGHT.search(parameters)
            quality = float(weight[1]) if weight else 1.0
            if offer is not None and quality > best_weight:
                best, best_weight = offer, quality
    return best


def _text(error: ExchangeError) -> bytes:
    return f"gmux: {error}\n".encode()


def _problem(error: ExchangeError, status: int, title: str) -> bytes:
    """In the form of RFC 9457."""
    return json.dumps({"status": status, "title": title, "detail": str(error), "cause": error.cause}).encode() + b"\n"
