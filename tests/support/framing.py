"""How the peers of a test cut and make messages; written anew here, so that gmux's codecs are not tested by themselves.

Each framing reads whole messages off a stream and gives them back as they came, with `wrap` and `payload` between the
message and what it says. `garbage` breaks the framing, or is None where any bytes are a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Stream(Protocol):
    def until(self, end: bytes) -> bytes: ...

    def exactly(self, size: int) -> bytes: ...


class Framing:
    """`protocol` is the name of gmux's codec.

    `probe_answer` says what a good target answers when gmux itself asks whether requests may go together, and nothing
    to the request of a client.
    """

    def __init__(
        self,
        protocol: str,
        read: Callable[[Stream], bytes],
        wrap: Callable[[bytes], bytes],
        payload: Callable[[bytes], bytes],
        garbage: bytes | None = None,
        probe_answer: Callable[[bytes], bytes] = lambda request: b"",
    ) -> None:
        self.protocol = protocol
        self.read = read
        self.wrap = wrap
        self.payload = payload
        self.garbage = garbage
        self.probe_answer = probe_answer

    def answer(self, request: bytes) -> bytes:
        """What a good target says: the request's own payload, so that an answer names its request."""
        return self.wrap(self.payload(request))

    def __repr__(self) -> str:
        return self.protocol


def _read_binary(stream: Stream) -> bytes:
    header = stream.exactly(2)
    return header + stream.exactly(int.from_bytes(header, "big"))


def _read_digits(stream: Stream) -> bytes:
    header = stream.exactly(4)
    return header + stream.exactly(int(header))


def _read_http(stream: Stream) -> bytes:
    head = stream.until(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return head + stream.exactly(int(value))
    return head


def _wrap_http(payload: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(payload), payload)


def _http_target(message: bytes) -> bytes:
    """The target of a request, without its slash; the body of an answer."""
    if message.startswith(b"HTTP/"):
        return message.partition(b"\r\n\r\n")[2]
    return message.split(b" ", 2)[1][1:]


def _probe_answer(request: bytes) -> bytes:
    head, _, _ = request.partition(b"\r\n\r\n")
    if b"\r\nUser-Agent: gmux (pipelining test)" not in head:
        return b""
    if request.startswith(b"HEAD "):
        return b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    return b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone"


LINE = Framing("echo", lambda stream: stream.until(b"\n"), lambda text: text + b"\n", lambda line: line[:-1])
ISO8583 = Framing(
    "iso8583", _read_binary, lambda text: len(text).to_bytes(2, "big") + text, lambda m: m[2:], b"\xff\xffbroken"
)
MPU = Framing("mpu", _read_digits, lambda text: b"%04d%b" % (len(text), text), lambda m: m[4:], b"broken")
#: `wrap` makes answers; a test makes its own requests.
HTTP = Framing("http", _read_http, _wrap_http, _http_target, b"not HTTP\r\n\r\n", _probe_answer)
