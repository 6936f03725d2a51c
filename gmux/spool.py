"""Bytes on their way that cannot be sent yet: in memory up to a size, then in a temporary file, up to a limit."""

from __future__ import annotations

from collections import deque
from tempfile import TemporaryFile
from typing import IO

CHUNK = 64 * 1024
#: Pieces below this size are joined, so that a message that comes byte by byte costs bytes and not objects.
SMALL = 4 * 1024


class Full(Exception):
    """No more can be held; the text says which limit was met."""


class Memory:
    """The bytes that all spools and unfinished requests of the service may hold in memory together."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        """Count `size` bytes more; false, and nothing counted, when that is past the limit."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        self.used -= size


class Spool:
    """First in, first out. `write` may use the disk (the page cache, in practice); it never switches greenlets."""

    __slots__ = ("_memory", "_memory_limit", "_limit", "_chunks", "_in_memory", "_file", "_written", "_read")

    def __init__(self, memory: Memory, memory_limit: int, limit: int) -> None:
        self._memory = memory
        self._memory_limit = memory_limit
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._in_memory = 0
        self._file: IO[bytes] | None = None
        self._written = self._read = 0

    def __len__(self) -> int:
        return self._in_memory + self._written - self._read

    def write(self, data: bytes) -> None:
        """Append `data`. Raises Full, also for a disk that is full."""
        size = len(data)
        if not size:
            return  # an empty chunk would look like the end to who reads
        if len(self) + size > self._limit:
            raise Full(f"more than {self._limit} bytes are held")
        if self._file is None and self._in_memory + size <= self._memory_limit and self._memory.take(size):
            chunks = self._chunks
            if chunks and len(chunks[-1]) < SMALL:
                chunks[-1] += data
            else:
                chunks.append(data)
            self._in_memory += size
            return
        try:
            if self._file is None:
                self._file = TemporaryFile(prefix="gmux-", buffering=0)
            self._file.seek(self._written)
            written = 0
            while written < size:
                written += self._file.write(data[written:])
        except OSError as error:
            raise Full(f"the temporary file cannot be written: {error.strerror}") from None
        self._written += size

    def read(self) -> bytes:
        """Remove and return the next bytes, at most about CHUNK; empty when nothing is held."""
        if self._chunks:
            data = self._chunks.popleft()
            self._in_memory -= len(data)
            self._memory.give(len(data))
            return data
        if self._file is None:
            return b""
        self._file.seek(self._read)
        # Behind `_written` may lie what a write left that failed half-way.
        data = self._file.read(min(CHUNK, self._written - self._read))
        self._read += len(data)
        if self._read == self._written:
            # All of it is out: memory may serve again, and the disk gets its blocks back.
            self._close_file()
        return data

    def close(self) -> None:
        """Drop what is held."""
        self._memory.give(self._in_memory)
        self._in_memory = 0
        self._chunks.clear()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._written = self._read = 0
