"""The bytes of one direction of one connection that no message has taken yet."""

from __future__ import annotations

import re


class Buffer:
    """Bytes in, pieces out, each byte copied a bounded number of times however small the reads are.

    What was read is kept as it came while one read holds whole messages (the common case: no copy); it becomes a
    `bytearray` only when a message spans reads. `data` is empty exactly when nothing is held.
    """

    __slots__ = ("_searched", "_start", "data", "owed")

    def __init__(self) -> None:
        self.data: bytes | bytearray = b""
        #: What the peer is to get at once, such as the answer to a keepalive.
        self.owed = b""
        self._start = 0
        # Bytes behind `_start` searched in vain: without it a long message that comes byte by byte would cost the
        # square of its length.
        self._searched = 0

    def __len__(self) -> int:
        return len(self.data) - self._start

    def receive_data(self, data: bytes) -> None:
        """Append what was read."""
        held = self.data
        if not held:
            self.data = data
        elif type(held) is bytearray:
            # Deleting at the front of a bytearray moves a pointer, not the bytes.
            del held[: self._start]
            self._start = 0
            held += data
        else:
            self.data = bytearray(memoryview(held)[self._start :])
            self.data += data
            self._start = 0

    def take(self, size: int) -> bytes:
        """Remove and return the first `size` bytes; the caller has checked that they are there."""
        data, start = self.data, self._start
        end = start + size
        self._searched = 0
        if end == len(data):
            self.data, self._start = b"", 0
            return data if start == 0 and type(data) is bytes else bytes(data[start:])
        self._start = end
        return bytes(data[start:end])

    def take_through(self, piece: bytes) -> bytes | None:
        """Remove and return everything up to the end of the first `piece`; None when it is not there yet."""
        data, start = self.data, self._start
        end = data.find(piece, start + self._searched)
        if end < 0:
            self._searched = max(0, len(data) - start - len(piece) + 1)
            return None
        end += len(piece)
        if end == len(data) and not start and type(data) is bytes:
            self.data, self._searched = b"", 0
            return data
        return self.take(end - start)

    def match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """What `pattern` matches at the front; the places in it are those in `data`."""
        return pattern.match(self.data, self._start)

    def drop(self, size: int) -> None:
        """Remove the first `size` bytes, which are there."""
        self._searched = 0
        self._start += size
        if self._start == len(self.data):
            self.data, self._start = b"", 0

    def take_owed(self) -> bytes:
        """What is owed, which the caller sends."""
        owed, self.owed = self.owed, b""
        return owed

    def put_back(self, data: bytes) -> None:
        """Hold `data` in place of all that is held: what was just taken, for who asks how it began."""
        self.data, self._start = data, 0

    def peek(self, size: int) -> bytes:
        """The first `size` bytes, or fewer when fewer are there; nothing is removed."""
        return bytes(self.data[self._start : self._start + size])
