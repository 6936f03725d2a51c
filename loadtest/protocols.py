"""The messages of the load, for both ends: how they are cut, and what makes an answer the right one.

Every request carries a token of its own, and its answer must carry it back. The framing is written anew, so that gmux's
codecs are not judged by themselves.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod

import iso8583
from iso8583.specs import default_ascii as SPEC

#: Tells the tokens of this process from those of others that load the same target.
PROCESS = os.urandom(4).hex()

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3}[^\r\n]*)\r\n")


class BadAnswer(Exception):
    """An answer that is not the one to its request, or none at all; the text is the same for all of its kind."""


class WrongAnswer(BadAnswer):
    """The answer to another request: the one error that nobody notices who does not look for it."""

    def __init__(self) -> None:
        super().__init__("the answer to another request")


class Protocol(ABC):
    name: str

    #: Whether the answers on one connection come in the order of their requests.
    is_ordered = True

    @abstractmethod
    def request(self, user: int, number: int) -> bytes:
        """The request `number` of `user`, unlike any other."""

    @abstractmethod
    def cut(self, buffer: bytearray) -> bytes | None:
        """The first message, taken off the buffer; None until it is whole. Raises BadAnswer."""

    @abstractmethod
    def answer(self, request: bytes) -> bytes:
        """What a good target says. Raises BadAnswer when `request` is none."""

    @abstractmethod
    def check(self, request: bytes, answer: bytes) -> None:
        """Raises BadAnswer unless `answer` is the one to `request`."""


class Echo(Protocol):
    name = "echo"

    def request(self, user: int, number: int) -> bytes:
        return b"%b\n" % token(user, number)

    def cut(self, buffer: bytearray) -> bytes | None:
        return take(buffer, buffer.find(b"\n") + 1)

    def answer(self, request: bytes) -> bytes:
        return request

    def check(self, request: bytes, answer: bytes) -> None:
        if answer != request:
            raise WrongAnswer


class Http(Protocol):
    """A GET whose token is its path; the body of the answer has the path in it."""

    name = "http"

    def request(self, user: int, number: int) -> bytes:
        return b"GET /%b HTTP/1.1\r\nHost: loadtest\r\n\r\n" % token(user, number)

    def cut(self, buffer: bytearray) -> bytes | None:
        end = buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return None
        length = CONTENT_LENGTH.search(buffer, 0, end)
        if length:
            end += int(length[1])
        elif buffer.startswith(b"HTTP/"):
            raise BadAnswer("an answer without Content-Length")
        return take(buffer, end)

    def answer(self, request: bytes) -> bytes:
        body = self._path(request) + b"\n"
        return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    def check(self, request: bytes, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        status = STATUS.match(head + b"\r\n")
        if not status:
            raise BadAnswer("not an answer of HTTP")
        if not status[1].startswith(b"200"):
            raise BadAnswer(status[1].decode("latin-1"))
        if self._path(request) not in body:
            raise WrongAnswer

    @staticmethod
    def _path(request: bytes) -> bytes:
        try:
            return request.split(b" ", 2)[1]
        except IndexError:
            raise BadAnswer("not a request of HTTP") from None


class Iso8583(Protocol):
    """A financial request (0200): trace number in field 11, terminal in 41, token in 48."""

    name = "iso8583"
    is_ordered = False

    def request(self, user: int, number: int) -> bytes:
        trace, terminal = f"{number % 1_000_000:06}", f"T{user:07}"
        fields = {"t": "0200", "11": trace, "41": terminal, "48": token(user, number).decode()}
        message, _ = iso8583.encode(fields, SPEC)
        return len(message).to_bytes(2, "big") + bytes(message)

    def cut(self, buffer: bytearray) -> bytes | None:
        return take(buffer, 2 + int.from_bytes(buffer[:2], "big") if len(buffer) >= 2 else 0)

    def answer(self, request: bytes) -> bytes:
        if request[2:6] != b"0200":
            raise BadAnswer("a message of another type than 0200")
        # Not through pyiso8583: a benchmark would measure it, and not what stands before this target.
        return request[:2] + b"0210" + request[6:]

    def check(self, request: bytes, answer: bytes) -> None:
        if answer == self.answer(request):
            return
        asked, got = self._decode(request), self._decode(answer)
        if got["t"] != "0210":
            raise BadAnswer("a message of another type than 0210")
        # Terminal and trace number name a request, by the standard; not every host sends field 48 back.
        names = ["11", "41"] + ["48"] * ("48" in got)
        if any(got.get(name) != asked[name] for name in names):
            raise WrongAnswer

    @staticmethod
    def _decode(frame: bytes) -> dict[str, str]:
        try:
            fields, _ = iso8583.decode(frame[2:], SPEC)
        except iso8583.DecodeError:
            raise BadAnswer("not a message of ISO 8583") from None
        return dict(fields)


def token(user: int, number: int) -> bytes:
    return f"{PROCESS}-{user}-{number}".encode()


def take(buffer: bytearray, size: int) -> bytes | None:
    """The first `size` bytes, off the buffer; None when it has fewer, or `size` is 0."""
    if not 0 < size <= len(buffer):
        return None
    data = bytes(buffer[:size])
    del buffer[:size]
    return data


PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (Echo(), Http(), Iso8583())}
