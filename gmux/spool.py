"""Bytes on their way that cannot be sent yet: in memory up to a size, then on disk, up to a limit."""

from __future__ import annotations

from collections import deque

from gmux.disk import BLOCK, Disk, Full
from gmux.memory import Memory

#: Pieces below this size are joined, so that a message that comes byte by byte costs bytes and not objects.
SMALL = 4 * 1024


class Spool:
    """First in, first out. `write` may use the disk (the page cache, in practice); it never switches greenlets."""

    __slots__ = (
        "_memory",
        "_disk",
        "_memory_limit",
        "_limit",
        "_chunks",
        "_skipped",
        "_in_memory",
        "_blocks",
        "_begin",
        "_end",
        "_size",
    )

    def __init__(self, memory: Memory, disk: Disk, memory_limit: int, limit: int) -> None:
        self._memory = memory
        self._disk = disk
        self._memory_limit = memory_limit
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        # Of the first chunk, the bytes that were skipped; they count as long as it is here.
        self._skipped = 0
        self._in_memory = 0
        self._blocks: deque[int] = deque()
        # Where what is held begins in the first block, and where it ends in the last one.
        self._begin = 0
        self._end = BLOCK
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def write(self, data: bytes) -> None:
        """Append `data`. Raises Full, also for a disk that is full."""
        size = len(data)
        if not size:
            return  # an empty chunk would look like the end to who reads
        if self._size + size > self._limit:
            raise Full(f"more than {self._limit} bytes are held (--spool-limit)")
        if not self._blocks and self._in_memory + size <= self._memory_limit and self._memory.take_spare(size):
            chunks = self._chunks
            if chunks and len(chunks[-1]) < SMALL:
                chunks[-1] += data
            else:
                chunks.append(data)
            self._in_memory += size
        else:
            try:
                self._write_to_disk(data)
            except OSError as error:
                raise Full(f"the temporary file cannot be written: {error.strerror}") from None
        self._size += size

    def _write_to_disk(self, data: bytes) -> None:
        """Write all of it, or leave what is held as it was. Raises Full, OSError."""
        disk = self._disk
        room = BLOCK - self._end
        taken = disk.take(-(-max(0, len(data) - room) // BLOCK))
        rest = memoryview(data)
        try:
            if room:
                disk.write(self._blocks[-1], self._end, rest[:room])
                rest = rest[room:]
            for block in taken:
                disk.write(block, 0, rest[:BLOCK])
                rest = rest[BLOCK:]
        except OSError:
            disk.give(taken)
            raise
        self._blocks += taken
        self._end = (self._end + len(data) - 1) % BLOCK + 1

    def read(self) -> bytes:
        """Remove and return the next bytes, as many as `peek` shows; empty when nothing is held."""
        data = self.peek()
        self.skip(len(data))
        return bytes(data)

    def peek(self) -> bytes | memoryview:
        """The next bytes, of disk at most BLOCK; empty when nothing is held."""
        if self._chunks:
            chunk = self._chunks[0]
            return memoryview(chunk)[self._skipped :] if self._skipped else chunk
        if self._blocks:
            return self._disk.read(self._blocks[0], self._begin, self._end if len(self._blocks) == 1 else BLOCK)
        return b""

    def skip(self, size: int) -> None:
        """Remove the first `size` bytes of those that `peek` shows."""
        self._size -= size
        if self._chunks:
            self._skipped += size
            if self._skipped == len(self._chunks[0]):
                self._chunks.popleft()
                self._in_memory -= self._skipped
                self._memory.give(self._skipped)
                self._skipped = 0
        elif self._blocks:
            self._begin += size
            if self._begin == (self._end if len(self._blocks) == 1 else BLOCK):
                self._disk.give([self._blocks.popleft()])
                self._begin = 0
                if not self._blocks:
                    # Memory may serve again.
                    self._end = BLOCK

    def close(self) -> None:
        """Drop what is held."""
        self._memory.give(self._in_memory)
        self._in_memory = self._size = self._skipped = self._begin = 0
        self._chunks.clear()
        if self._blocks:
            self._disk.give(self._blocks)
            self._blocks.clear()
            self._end = BLOCK
