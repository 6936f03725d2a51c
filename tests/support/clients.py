"""Clients, good and bad."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import gevent
from gevent import socket

from gmux.net import Address
from tests.support.framing import LINE, Framing
from tests.support.stream import Closed, SocketStream


class Client(SocketStream):
    """A client of gmux at `address`. Use it in a `with`; every wait of it ends after PATIENCE."""

    def __init__(self, address: Address, framing: Framing = LINE, receive_buffer: int = 0) -> None:
        is_unix = isinstance(address, str)
        inet = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock: Any = socket.socket(socket.AF_UNIX if is_unix else inet)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        super().__init__(sock)
        sock.connect(address)
        if not is_unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.framing = framing

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send_raw(self, data: bytes) -> None:
        """Raises Closed."""
        try:
            self.sock.sendall(data)
        except TimeoutError:
            raise AssertionError("gmux takes nothing") from None
        except OSError:
            raise Closed(is_reset=True) from None

    def send(self, payload: bytes) -> None:
        self.send_raw(self.framing.wrap(payload))

    def receive(self) -> bytes:
        """The payload of the next answer. Raises Closed."""
        return self.framing.payload(self.framing.read(self))

    def ask(self, payload: bytes) -> bytes:
        self.send(payload)
        return self.receive()

    def outcome(self, payload: bytes) -> str:
        """`answered` or `closed`; any other answer than the client's own fails."""
        try:
            got = self.ask(payload)
        except Closed:
            return "closed"
        assert got == payload, f"asked {payload[:80]!r}, got {got[:80]!r}"
        return "answered"

    def receive_end(self) -> None:
        """Fail unless gmux ends the connection without a further byte."""
        with suppress(Closed):
            self._more()
        assert not self._held, f"more came: {self._held[:80]!r}"

    # Bad manners.

    def send_half(self, payload: bytes) -> None:
        data = self.framing.wrap(payload)
        self.send_raw(data[: len(data) // 2])

    def drip(self, payload: bytes) -> None:
        """Send byte by byte, each in a turn of the loop of its own."""
        data = self.framing.wrap(payload)
        for at in range(len(data)):
            self.send_raw(data[at : at + 1])
            gevent.sleep(0)

    def pipeline(self, payloads: Iterable[bytes]) -> None:
        """Send all requests in one go, without waiting for an answer."""
        self.send_raw(b"".join(map(self.framing.wrap, payloads)))

    def flood(self, data: bytes, limit: int, patience: float = 0.3) -> int:
        """Send `data` again and again, up to `limit` bytes or until nothing was taken for `patience` seconds."""
        sent = 0
        self.sock.settimeout(patience)
        with suppress(OSError):
            while sent < limit:
                sent += self.sock.send(data)
        return sent

    def vanish(self, how: str) -> None:
        """`fin` or `reset`."""
        getattr(self, how)()


def tagged(client: int, number: int) -> bytes:
    """A payload that names its client and its place."""
    return b"c%d.r%d" % (client, number)


def untag(payload: bytes) -> tuple[int, int]:
    match = re.match(rb"c(\d+)\.r(\d+)", payload)
    assert match, f"not a tagged payload: {payload[:80]!r}"
    return int(match[1]), int(match[2])
