"""A gevent socket with what was read of it and no message has taken: the base of both peers of a test."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

from gevent import socket

from tests.support.wait import PATIENCE


class Closed(Exception):
    """The other side ended the connection; `is_reset` says how."""

    def __init__(self, is_reset: bool = False) -> None:
        super().__init__("reset" if is_reset else "closed")
        self.is_reset = is_reset


class SocketStream:
    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self._held = b""

    def _more(self) -> None:
        try:
            data = self.sock.recv(256 * 1024)
        except TimeoutError:
            raise AssertionError(f"nothing came within {PATIENCE:g} s") from None
        except OSError:
            raise Closed(is_reset=True) from None
        if not data:
            raise Closed
        self._held += data

    def exactly(self, size: int) -> bytes:
        while len(self._held) < size:
            self._more()
        data, self._held = self._held[:size], self._held[size:]
        return data

    def until(self, end: bytes) -> bytes:
        # Only what is new is searched: the messages of some tests have megabytes.
        searched = 0
        while (at := self._held.find(end, searched)) < 0:
            searched = max(0, len(self._held) - len(end) + 1)
            self._more()
        return self.exactly(at + len(end))

    def rest(self) -> bytes:
        """All that comes until the other side closes in good order. Raises Closed when it does not."""
        try:
            while True:
                self._more()
        except Closed as end:
            if end.is_reset:
                raise
        data, self._held = self._held, b""
        return data

    def fin(self) -> None:
        """Close in good order: what was sent still arrives."""
        with suppress(OSError):
            # A close alone waits for the loop when another greenlet reads: the FIN must be out when this returns.
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def reset(self) -> None:
        """Close with a RST."""
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
