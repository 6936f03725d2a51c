"""Bytes on their way that cannot be sent yet: in memory up to a size, then in a temporary file, up to a limit."""

from __future__ import annotations

from collections import deque
from tempfile import TemporaryFile
from typing import IO

CHUNK = 64 * 1024
#: Pieces below this size are joined, so that a message that comes byte by byte costs bytes and not objects.
SMALL = 4 * 1024

#: Bytes of one temporary file; a message in step with its reader uses at most two.
SEGMENT = 16 * 1024 * 1024


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


class _Segment:
    """A part of a spool on disk: a temporary file without a name, written and read from its beginning to its end."""

    __slots__ = ("file", "read", "written")

    def __init__(self) -> None:
        self.file: IO[bytes] = TemporaryFile(prefix="gmux-", buffering=0)
        self.written = self.read = 0


class Spool:
    """First in, first out. `write` may use the disk (the page cache, in practice); it never switches greenlets.

    What is on disk is in segments, so that the disk gets back what was read while more is written.
    """

    __slots__ = ("_memory", "_memory_limit", "_limit", "_chunks", "_in_memory", "_segments", "_on_disk")

    def __init__(self, memory: Memory, memory_limit: int, limit: int) -> None:
        self._memory = memory
        self._memory_limit = memory_limit
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._in_memory = 0
        self._segments: deque[_Segment] = deque()
        self._on_disk = 0

    def __len__(self) -> int:
        return self._in_memory + self._on_disk

    def write(self, data: bytes) -> None:
        """Append `data`. Raises Full, also for a disk that is full."""
        size = len(data)
        if not size:
            return  # an empty chunk would look like the end to who reads
        if len(self) + size > self._limit:
            raise Full(f"more than {self._limit} bytes are held")
        if not self._segments and self._in_memory + size <= self._memory_limit and self._memory.take(size):
            chunks = self._chunks
            if chunks and len(chunks[-1]) < SMALL:
                chunks[-1] += data
            else:
                chunks.append(data)
            self._in_memory += size
            return
        try:
            self._write_to_disk(data)
        except OSError as error:
            raise Full(f"the temporary file cannot be written: {error.strerror}") from None
        self._on_disk += size

    def _write_to_disk(self, data: bytes) -> None:
        segments = self._segments
        if not segments or segments[-1].written >= SEGMENT:
            segments.append(_Segment())
        segment = segments[-1]
        segment.file.seek(segment.written)
        done = 0
        while done < len(data):
            done += segment.file.write(data[done:])
        segment.written += done

    def read(self) -> bytes:
        """Remove and return the next bytes, at most about CHUNK; empty when nothing is held."""
        if self._chunks:
            data = self._chunks.popleft()
            self._in_memory -= len(data)
            self._memory.give(len(data))
            return data
        if not self._segments:
            return b""
        segment = self._segments[0]
        segment.file.seek(segment.read)
        # Behind `written` may lie what a write left that failed half-way.
        data = segment.file.read(min(CHUNK, segment.written - segment.read))
        segment.read += len(data)
        self._on_disk -= len(data)
        if segment.read == segment.written:
            # When it was the last one, memory may serve again.
            self._segments.popleft().file.close()
        return data

    def close(self) -> None:
        """Drop what is held."""
        self._memory.give(self._in_memory)
        self._in_memory = self._on_disk = 0
        self._chunks.clear()
        while self._segments:
            self._segments.popleft().file.close()
