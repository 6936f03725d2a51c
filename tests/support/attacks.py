"""Attacks by a crowd of clients or by a target, in processes of their own, at a limited rate or as fast as it goes.

Run as a program: `attacks NAME SIDE HOST:PORT BYTES`, where SIDE is `clients` or `target` and BYTES is a limit a
second, or 0. A target takes the port that it is given. Ended by TERM, it prints how many bytes a second it has sent.
"""

from __future__ import annotations

import select
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

import iso8583
from iso8583.specs import default_ascii

#: Seconds between two looks at what may be sent; a connection that takes nothing for STUCK has all it will get.
TICK = 0.005
STUCK = 0.2


@dataclass(frozen=True)
class Side:
    """What each connection sends: `opening`, then `message` again and again.

    a_second    messages a second of all connections together, where the rate is limited
    piece       bytes of one send
    waits       nothing is sent before something came
    is_deaf     what comes is not read
    bytes_each  after so many, another connection is made
    holds       connections that have sent their bytes and are kept open; the oldest is reset
    """

    opening: bytes = b""
    message: bytes = b""
    a_second: float = 0.0
    connections: int = 24
    piece: int = 65536
    waits: bool = False
    is_deaf: bool = False
    bytes_each: int = 0
    holds: int = 0

    @property
    def limit(self) -> float:
        """Bytes a second, where the rate is limited."""
        return self.a_second * len(self.message or self.opening)


@dataclass(frozen=True)
class Attack:
    """Without `target`, a good one answers the clients."""

    protocol: str
    clients: Side
    target: Side | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def attacker(self) -> str:
        return "clients" if self.clients.a_second else "target"

    @property
    def limit(self) -> float:
        side = getattr(self, self.attacker)
        assert isinstance(side, Side)
        return side.limit


def framed(kind: str, **fields: str) -> bytes:
    """A message of ISO 8583; the fields are `f11` and so on."""
    named = {name[1:]: value for name, value in fields.items()}
    data, _ = iso8583.encode({"t": kind, **named}, default_ascii)
    return len(data).to_bytes(2, "big") + bytes(data)


# Just below 2 MB, or 2,000 messages, a second.
BYTES, MESSAGES = 1.9e6, 1900

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
GET = HEAD + b"\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"1\r\nx\r\n"
EXTENDED = b"1;" + b"e" * 200 + b"\r\nx\r\n"
OPTIONS = (
    HEAD
    + b"Connection: %b\r\n" % b",".join(b"%x" % n for n in range(6000))
    + b"".join(b"A%d:\r\n" % n for n in range(90))
    + b"\r\n"
)
BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 65536\r\n\r\n" + b"." * 65536
REQUEST = framed("0200", f11="000001", f41="TERM0001")
LATE = framed("0210", f11="999999", f41="TERM9999")
ECHO_TEST = framed("0800", f7="1125084600", f11="000001", f70="301")
ADVICE = framed("0620", f7="1125084600", f11="000001")

BY_KEY = {"pipeline": "8"}
BROWSERS = Side(GET, connections=8)
TERMINALS = Side(REQUEST, connections=8)
SILENT = Side()


def by_bytes(message: bytes) -> float:
    return BYTES / len(message)


def answering(opening: bytes, message: bytes, a_second: float) -> Attack:
    return Attack("http", BROWSERS, Side(opening, message, a_second, waits=True))


def talking(message: bytes, a_second: float, **settings: str) -> Attack:
    return Attack("iso8583", TERMINALS, Side(b"", message, a_second), settings)


ATTACKS = {
    # Crowds of clients.
    "1-byte chunks of clients": Attack("http", Side(POST, CHUNK, by_bytes(CHUNK))),
    "6,000 Connection options": Attack("http", Side(b"", OPTIONS, by_bytes(OPTIONS))),
    "one byte at a time": Attack("http", Side(HEAD + b"A: ", b"a", MESSAGES, piece=1)),
    "pipelined GETs": Attack("http", Side(b"", GET, MESSAGES)),
    "bad lines": Attack("http", Side(b"", b"bad\r\n\r\n", MESSAGES, bytes_each=7, holds=500)),
    "far ahead, then gone": Attack(
        "iso8583", Side(b"", REQUEST, by_bytes(REQUEST), bytes_each=200_000, holds=24), SILENT
    ),
    "slow readers": Attack(
        "http",
        Side(b"", GET, by_bytes(BODY), is_deaf=True, bytes_each=len(GET), holds=50),
        Side(b"", BODY, waits=True, bytes_each=len(BODY)),
    ),
    # Targets.
    "1-byte chunks of a target": answering(CHUNKED, CHUNK, by_bytes(CHUNK)),
    "chunk extensions": answering(CHUNKED, EXTENDED, by_bytes(EXTENDED)),
    "endless 100s": answering(b"", b"HTTP/1.1 100 Continue\r\n\r\n", MESSAGES),
    "endless body": answering(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000, BYTES / 1000),
    "endless head": answering(b"HTTP/1.1 200 OK\r\n", b"A: %b\r\n" % (b"b" * 1000), BYTES / 1005),
    "late answers": talking(LATE, MESSAGES, **BY_KEY),
    "echo tests, strict": talking(ECHO_TEST, MESSAGES, answer_network_management="true"),
    "echo tests, by key": talking(ECHO_TEST, MESSAGES, answer_network_management="true", **BY_KEY),
    "advices dropped": talking(ADVICE, MESSAGES, **BY_KEY),
    "advices broadcast": talking(ADVICE, MESSAGES, unsolicited="broadcast", **BY_KEY),
    "polls": talking(b"\0\0", MESSAGES),
    "polls, by key": talking(b"\0\0", MESSAGES, **BY_KEY),
}


@dataclass
class Link:
    """A connection of the attacker; `rest` is what it sends next."""

    sock: socket.socket
    rest: memoryview
    may_send: bool
    sent: int = 0
    last: float = field(default_factory=monotonic)


class Attacker:
    def __init__(self, side: Side, limit: float) -> None:
        self._side = side
        self._limit = limit
        self._blob = memoryview(side.message * max(1, 65536 // len(side.message)) if side.message else b"")
        self._links: dict[int, Link] = {}
        self._held: deque[Link] = deque()
        self._poll = select.epoll()
        self.sent = 0

    def run(self, role: str, address: tuple[str, int]) -> None:
        listening = socket.create_server(address) if role == "target" else None
        if listening is not None:
            listening.setblocking(False)
            self._poll.register(listening, select.EPOLLIN)
            print("listening", flush=True)
        before, allowance, is_busy = monotonic(), 0.0, False
        while True:
            for descriptor, _ in self._poll.poll(0 if is_busy else TICK):
                if listening is not None and descriptor == listening.fileno():
                    with suppress(OSError):
                        self._add(listening.accept()[0])
                elif descriptor in self._links:
                    self._read(self._links[descriptor])
            if listening is None:
                self._connect(address)
            now = monotonic()
            # Not more than a few ticks at once: who was held up does not make up for it.
            allowance = min(allowance + self._limit * (now - before), max(self._limit * 0.05, self._side.piece / 64))
            before = now
            is_busy = False
            for link in list(self._links.values()):
                room = int(allowance) if self._limit else self._side.piece
                sent = self._send(link, room, now) if link.may_send and room > 0 else 0
                allowance -= sent
                # Where more is allowed, one look a tick would not reach the limit.
                is_busy |= sent > 0 and (not self._limit or allowance >= self._side.piece)
            # The next one has the first turn: a limit must not go to one connection alone.
            if self._limit and self._links:
                first = next(iter(self._links))
                self._links[first] = self._links.pop(first)

    def _connect(self, address: tuple[str, int]) -> None:
        while len(self._links) < self._side.connections:
            try:
                self._add(socket.create_connection(address, 5))
            except OSError:
                return

    def _add(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links[sock.fileno()] = Link(sock, memoryview(self._side.opening), not self._side.waits)
        if not self._side.is_deaf:
            self._poll.register(sock, select.EPOLLIN)

    def _read(self, link: Link) -> None:
        try:
            if link.sock.recv(262_144):
                link.may_send = True
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._end(link)

    def _send(self, link: Link, room: int, now: float) -> int:
        side = self._side
        left = side.bytes_each - link.sent if side.bytes_each else side.piece
        if not link.rest:
            link.rest = self._blob
        piece = link.rest[: min(room, left, side.piece)]
        if not piece:
            return 0
        try:
            sent = link.sock.send(piece)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._end(link)
            return 0
        link.rest = link.rest[sent:]
        link.sent += sent
        self.sent += sent
        if sent:
            link.last = now
        if side.bytes_each and (link.sent >= side.bytes_each or now - link.last > STUCK):
            self._hold(link)
        return sent

    def _hold(self, link: Link) -> None:
        """It has sent all; a target's is of use again for the next request."""
        if self._side.waits:
            link.sent, link.may_send, link.rest = 0, False, memoryview(self._side.opening)
            return
        del self._links[link.sock.fileno()]
        if not self._side.is_deaf:
            self._poll.unregister(link.sock)
        self._held.append(link)
        while len(self._held) > self._side.holds:
            reset(self._held.popleft().sock)

    def _end(self, link: Link) -> None:
        del self._links[link.sock.fileno()]
        link.sock.close()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def main(name: str, role: str, address: str, limit: float) -> None:
    attack = ATTACKS[name]
    # Without a target of its own, it is one that swallows all.
    side = attack.clients if role == "clients" else attack.target or SILENT
    attacker = Attacker(side, limit)
    host, _, port = address.rpartition(":")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    began = monotonic()
    try:
        attacker.run(role, (host, int(port)))
    finally:
        print(attacker.sent / (monotonic() - began), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
