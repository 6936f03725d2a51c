"""A strict reader of HTTP/1.1: bytes in, messages out, and an error for all that two readers could read in two ways.

It judges what gmux sends, so it shares nothing with gmux. It takes one spelling of each message, the one that RFC 9112
asks of a sender, and none of what the RFC lets a recipient forgive. Sections are those of RFC 9112 where no other
is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Fields = list[tuple[bytes, bytes]]

DIGITS = b"0123456789"
LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TOKEN = DIGITS + LETTERS + b"!#$%&'*+-.^_`|~"  # RFC 9110 5.6.2
TEXT = bytes([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])  # RFC 9110 5.5: no control character but HTAB
HOST = DIGITS + LETTERS + b"-._~!$&'()*+,;=%:[]"  # RFC 3986 3.2.2, 3.2.3; no user is named (RFC 9110 4.2.4)
#: Wider than RFC 3986: clients send more, and only a fragment, which names nothing to a server, divides readers.
TARGET = bytes(range(0x21, 0x7F)).replace(b"#", b"")

LENGTH, CODING = b"content-length", b"transfer-encoding"
#: RFC 9110 6.5.1: what says where a message ends or goes cannot come behind it.
NOT_IN_TRAILERS = {LENGTH, CODING, b"host", b"connection", b"te", b"trailer"}
CHUNKED = -1


class NotStrict(AssertionError):
    """The bytes are not exactly HTTP/1.1."""


class Stream(Protocol):
    """Where messages are read from; it raises when it ends within a piece."""

    def until(self, end: bytes) -> bytes: ...

    def exactly(self, size: int) -> bytes: ...

    def rest(self) -> bytes:
        """All that comes before the connection ends in good order."""
        ...


@dataclass
class Message:
    fields: Fields
    body: bytes
    trailers: Fields

    def values(self, name: bytes) -> list[bytes]:
        return [value for own, value in self.fields if own.lower() == name.lower()]

    @property
    def is_last(self) -> bool:
        """9.6: nothing follows a message with the option `close`."""
        return any(o.strip(b" \t").lower() == b"close" for v in self.values(b"connection") for o in v.split(b","))


@dataclass
class Request(Message):
    method: bytes
    target: bytes
    version: bytes


@dataclass
class Answer(Message):
    """`is_interim`: another one follows for the same request."""

    version: bytes
    status: int
    reason: bytes

    @property
    def is_interim(self) -> bool:
        return self.status < 200


def requests(data: bytes) -> list[Request]:
    """All requests in `data`, which is nothing but requests."""
    stream, found = _Bytes(data), []
    while stream.data:
        _need(not found or not found[-1].is_last, "bytes behind the last request")  # 9.6
        found.append(read_request(stream))
    return found


def answers(data: bytes, methods: Sequence[bytes]) -> list[Answer]:
    """The answers to requests of these methods, with the interim ones; `data` is nothing else and all that came."""
    stream, found = _Bytes(data), []
    for method in methods:
        is_due = True
        while is_due:
            _need(not found or not found[-1].is_last, "an answer behind the last one")  # 9.6
            found.append(read_answer(stream, method))
            is_due = found[-1].is_interim
    _need(not stream.data, "bytes that nobody asked for")  # 9.2
    return found


def read_request(stream: Stream) -> Request:
    words = _line(stream).split(b" ")
    _need(len(words) == 3 and all(words), "a request line is not three words between single blanks")  # 3
    method, target, version = words
    _need(_has_only(method, TOKEN), "a method is not a token")  # 3.1
    # 3.2.1: a target gets an absolute path; 3.2.4: OPTIONS may be for the whole server. No proxy is asked (3.2.2), no
    # tunnel opened (3.2.3).
    _need(target[:1] == b"/" or (method, target) == (b"OPTIONS", b"*"), "a request target is not a path")
    _need(_has_only(target, TARGET), "a request target has what no URL has")
    _need(method != b"CONNECT", "a tunnel is asked for")
    _need(version == b"HTTP/1.1", "the version is another")  # 2.3
    fields = _fields(stream)
    hosts = [value for name, value in fields if name.lower() == b"host"]
    _need(len(hosts) == 1 and _has_only(hosts[0], HOST), "Host is not there once, or no host")  # 3.2
    body, trailers = _body(stream, _length(fields) or 0)  # 6.3: neither length nor chunks: no body
    return Request(fields, body, trailers, method, target, version)


def read_answer(stream: Stream, method: bytes) -> Answer:
    """The answer, or an interim one, to a request of this method."""
    words = _line(stream).split(b" ", 2)
    _need(len(words) == 3, "a status line is not three words")  # 4: the second blank stands without a reason, too
    version, status, reason = words
    _need(version == b"HTTP/1.1", "the version is another")  # 2.3
    _need(len(status) == 3 and status.isdigit() and status >= b"100", "a status is not three digits")  # 4
    _need(status != b"101", "the protocol is switched")  # RFC 9110 7.8: no request asks for that
    _need(_has_only(reason, TEXT), "a reason has control characters")  # 4
    fields = _fields(stream)
    length = _length(fields)
    if status[:1] == b"1" or status == b"204":
        _need(length is None, "a length where no body can be")  # 6.1, RFC 9110 8.6
        length = 0
    elif method == b"HEAD" or status == b"304":
        length = 0  # 6.3: the length is that of another answer
    body, trailers = (stream.rest(), []) if length is None else _body(stream, length)  # 6.3: else it ends with all
    return Answer(fields, body, trailers, version, int(status), reason)


def _line(stream: Stream) -> bytes:
    line = stream.until(b"\n")
    _need(line[-2:] == b"\r\n" and line.count(b"\r") == 1, "a line does not end in CRLF, or has CR in it")  # 2.2
    return line[:-2]


def _fields(stream: Stream, is_exact: bool = True) -> Fields:
    """Up to an empty line. Values that need not be exact may have blanks around them, as they may in the RFC (5.1)."""
    fields = []
    while line := _line(stream):
        name, colon, value = line.partition(b":")
        # 5.1: no blank before the colon; 5.2: a folded line begins with one.
        _need(bool(name and colon) and _has_only(name, TOKEN), "a line is not a field, or folded")
        value, came = value.strip(b" \t"), value.removeprefix(b" ")
        _need(value == came or not is_exact, "blanks around a value")  # 5.1: one before is what a sender should write
        _need(_has_only(value, TEXT), "a value has control characters")
        fields.append((name, value))
    return fields


def _length(fields: Fields) -> int | None:
    """The body's length as the fields say it, or CHUNKED."""
    said = [(name.lower(), value) for name, value in fields if name.lower() in (LENGTH, CODING)]
    _need(len(said) <= 1, "the length of a body is said more than once")  # 6.1, 6.3
    for name, value in said:
        if name == CODING:
            _need(value == b"chunked", "another coding than chunked")  # 6.1
            return CHUNKED
        return _number(value, DIGITS, 10)  # 6.2
    return None


def _body(stream: Stream, length: int) -> tuple[bytes, Fields]:
    """A body with its trailers."""
    if length != CHUNKED:
        return stream.exactly(length), []
    chunks = []
    while size := _number(_line(stream), b"0123456789abcdef", 16):  # 7.1; extensions (7.1.1) are nobody's here
        chunks.append(stream.exactly(size))
        _need(stream.exactly(2) == b"\r\n", "a chunk is not as long as it says")
    trailers = _fields(stream, is_exact=False)  # 7.1.2: they may pass as they came
    _need(not {name.lower() for name, _ in trailers} & NOT_IN_TRAILERS, "a trailer would change the message")
    return b"".join(chunks), trailers


def _number(text: bytes, digits: bytes, base: int) -> int:
    is_canonical = text == b"0" or text[:1] != b"0"
    _need(0 < len(text) < 20 and _has_only(text, digits) and is_canonical, "a number is not canonical")
    number = int(text, base)
    _need(number < 1 << 63, "a number is too large for most")  # 6.2, 7.1
    return number


def _has_only(data: bytes, allowed: bytes) -> bool:
    return not data.translate(None, allowed)


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotStrict(otherwise)


class _Bytes:
    """A stream that has come to its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def until(self, end: bytes) -> bytes:
        at = self.data.find(end)
        _need(at >= 0, "a message is not whole")  # 8
        return self.exactly(at + len(end))

    def exactly(self, size: int) -> bytes:
        _need(size <= len(self.data), "a message is not whole")  # 8
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def rest(self) -> bytes:
        return self.exactly(len(self.data))
