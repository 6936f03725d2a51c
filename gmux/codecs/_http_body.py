"""The bodies of HTTP/1 messages: where they end (RFC 9112 sections 6 and 7), and how they go on.

Each class reads one body off a buffer and gives it on in the framing of the other side, which may differ: a chunked
answer to an HTTP/1.0 client goes on bare, one that ends with the connection goes on chunked to an HTTP/1.1 client.
"""

from __future__ import annotations

import re
from typing import Protocol

from gmux.codecs._buffer import Buffer
from gmux.codecs.base import Part
from gmux.errors import FramingError, HeadTooLarge, MessageTooLarge

LAST_CHUNK = b"0\r\n\r\n"

#: Steps in one part: a small chunk takes one, any other three. Chunks of one byte would hold up the loop.
MAX_STEPS = 16

#: A chunk's size line, extensions included. Nobody uses extensions; whoever sends long ones is up to no good.
MAX_CHUNK_LINE = 256

_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[\t ]*;[\t \x21-\x7e\x80-\xff]*)?\r\n")
_SMALL_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,3})\r\n")
_FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t \x21-\x7e\x80-\xff]*\r\n")

#: Fields that change what a message is must not come behind it (RFC 9110 section 6.5.1).
_NOT_IN_TRAILERS = re.compile(
    rb"(?:content[_-]length|transfer[_-]encoding|host|connection|te|trailer|upgrade|expect|authorization|cookie"
    rb"|set-cookie|content-encoding|content-type|content-range|keep-alive|proxy-[a-z-]+|cache-control|max-forwards"
    rb"|range|if-[a-z-]+|forwarded|x[_-]forwarded[_-][a-z_-]+|via|www-authenticate|location|retry-after):",
    re.IGNORECASE,
)


def chunk(data: bytes) -> bytes:
    """`data` as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Body(Protocol):
    def read(self, buffer: Buffer) -> Part | None:
        """What the buffer has of the body, ready to go on; None: nothing. Raises FramingError."""
        ...

    def end(self) -> Part | None:
        """The last part of a body that the end of the connection completes; None: it does not."""
        ...


class LengthBody:
    """`length` bytes, as Content-Length says; past `limit` none is taken."""

    __slots__ = ("_left", "_limit")

    def __init__(self, length: int, limit: int | None = None) -> None:
        self._left = length
        self._limit = limit

    def read(self, buffer: Buffer) -> Part | None:
        if self._limit is not None and self._left > self._limit:
            raise MessageTooLarge(f"a body of {self._left} bytes is longer than {self._limit} (--max-message)")
        size = min(len(buffer), self._left)
        if not size:
            return None
        self._left -= size
        return Part(buffer.take(size), last=not self._left)

    def end(self) -> Part | None:
        return None


class EndBody:
    """All until the connection ends; goes on chunked if `as_chunks`."""

    __slots__ = ("_as_chunks",)

    def __init__(self, as_chunks: bool) -> None:
        self._as_chunks = as_chunks

    def read(self, buffer: Buffer) -> Part | None:
        if not len(buffer):
            return None
        data = buffer.take(len(buffer))
        return Part(chunk(data) if self._as_chunks else data, last=False)

    def end(self) -> Part | None:
        return Part(LAST_CHUNK if self._as_chunks else b"")


class ChunkedBody:
    """The chunked coding (RFC 9112 section 7.1), decoded and, if `as_chunks`, coded anew; extensions are dropped.

    `limit` is for the data, `max_head` for the trailers. Trailers pass when there are chunks; else they are left in
    `trailers`, lines with their ends. `size` counts the data so far, by what the chunks announce.
    """

    __slots__ = ("_as_chunks", "_limit", "_max_head", "_left", "_read", "_trailers_size", "size", "trailers")

    def __init__(self, as_chunks: bool, limit: int | None, max_head: int) -> None:
        self._as_chunks = as_chunks
        self._limit = limit
        self._max_head = max_head
        self._left = 0
        self._read = self._read_size
        self.size = 0
        self.trailers = b""
        self._trailers_size = 0

    def read(self, buffer: Buffer) -> Part | None:
        pieces: list[bytes] = []
        for _ in range(MAX_STEPS):
            if not self._read(buffer, pieces):
                break
        else:
            return Part(self._join(pieces), last=False)
        if self._read == self._read_nothing:
            end = b"0\r\n" + self.trailers + b"\r\n" if self._as_chunks else b""
            return Part(self._join(pieces) + end)
        return Part(self._join(pieces), last=False) if pieces else None

    def end(self) -> Part | None:
        return None

    def _join(self, pieces: list[bytes]) -> bytes:
        data = b"".join(pieces)
        return chunk(data) if data and self._as_chunks else data

    # Each step takes what it can, appends data to `pieces`, and returns whether the next step may go on.

    def _read_size(self, buffer: Buffer, pieces: list[bytes]) -> bool:
        if self._read_small(buffer, pieces):
            return True
        line = self._take_line(buffer, MAX_CHUNK_LINE)
        if line is None:
            return False
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise FramingError("a chunk does not begin with its size")
        self._left = int(match[1], 16)
        self.size += self._left
        if self._limit is not None and self.size > self._limit:
            raise MessageTooLarge(f"a body is longer than {self._limit} bytes (--max-message)")
        self._read = self._read_data if self._left else self._read_trailer
        return True

    def _read_small(self, buffer: Buffer, pieces: list[bytes]) -> bool:
        """Take a chunk that is small, without extensions and here whole, at a third of the cost of its steps."""
        match = buffer.match(_SMALL_CHUNK_LINE)
        if match is None:
            return False
        size = int(match[1], 16)
        begin = match.end()
        data = buffer.data[begin : begin + size + 2]
        if not size or len(data) < size + 2 or data[size:] != b"\r\n":
            return False
        if self._limit is not None and self.size + size > self._limit:
            return False
        self.size += size
        pieces.append(bytes(data[:size]))
        buffer.drop(begin - match.start() + size + 2)
        return True

    def _read_data(self, buffer: Buffer, pieces: list[bytes]) -> bool:
        size = min(len(buffer), self._left)
        if size:
            pieces.append(buffer.take(size))
            self._left -= size
        if self._left:
            return False
        self._read = self._read_end_of_chunk
        return True

    def _read_end_of_chunk(self, buffer: Buffer, pieces: list[bytes]) -> bool:
        end = buffer.peek(2)
        if not b"\r\n".startswith(end):
            raise FramingError("a chunk does not end where its size says")
        if len(end) < 2:
            return False
        buffer.take(2)
        self._read = self._read_size
        return True

    def _read_trailer(self, buffer: Buffer, pieces: list[bytes]) -> bool:
        line = self._take_line(buffer, self._max_head - self._trailers_size, HeadTooLarge, "the trailers are")
        if line is None:
            return False
        if line == b"\r\n":
            self._read = self._read_nothing
            return False
        if _FIELD_LINE.fullmatch(line) is None or _NOT_IN_TRAILERS.match(line):
            raise FramingError("a trailer is malformed or not allowed")
        self._trailers_size += len(line)
        name, _, value = line.partition(b":")
        self.trailers += name + b": " + value.strip(b"\t\r\n ") + b"\r\n"
        return True

    def _read_nothing(self, buffer: Buffer, pieces: list[bytes]) -> bool:
        return False

    def _take_line(
        self, buffer: Buffer, limit: int, error: type[FramingError] = FramingError, what: str = "a chunk size is"
    ) -> bytes | None:
        line = buffer.take_through(b"\n")
        if len(buffer if line is None else line) > limit:
            raise error(f"{what} longer than allowed")
        return line
