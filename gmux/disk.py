"""The bytes that all spools of a worker hold on disk: one temporary file without a name, in blocks.

One file for all: each spool with a file of its own would take a descriptor, which clients and the target need.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from tempfile import TemporaryFile
from typing import IO

BLOCK = 64 * 1024


class Full(Exception):
    """No more can be held; the text says which limit was met."""


class Disk:
    """Blocks of one file, which is open while any block is taken. The lowest free block is taken first, so that the
    file becomes shorter as what it holds becomes less."""

    __slots__ = ("_count", "_file", "_free", "_limit")

    def __init__(self, limit: int) -> None:
        """`limit`: the most bytes of the file."""
        self._limit = limit
        self._file: IO[bytes] | None = None
        #: The blocks of the file.
        self._count = 0
        #: Those that are free, in order. The last block of the file is never one of them.
        self._free: list[int] = []

    def take(self, number: int) -> list[int]:
        """`number` blocks, or none: raises Full, OSError."""
        free = self._free
        grown = self._count + max(0, number - len(free))
        if grown * BLOCK > self._limit:
            raise Full(f"temporary files may hold {self._limit} bytes (--disk-limit)")
        if self._file is None:
            self._file = TemporaryFile(prefix="gmux-", buffering=0)
        blocks = free[:number] + list(range(self._count, grown))
        del free[:number]
        self._count = grown
        return blocks

    def give(self, blocks: Iterable[int]) -> None:
        """Free blocks. The disk gets back what is free at the end of the file."""
        assert self._file is not None
        free, count = self._free, self._count
        free.extend(blocks)
        free.sort()  # most of it is in order, so it costs one walk
        while free and free[-1] == self._count - 1:
            self._count = free.pop()
        if not self._count:
            self._file.close()
            self._file = None
        elif self._count < count:
            self._file.truncate(self._count * BLOCK)

    def write(self, block: int, at: int, data: bytes | memoryview) -> None:
        """Write `data`, which fits, at that place of a block. Raises OSError; some of it may be written then."""
        assert self._file is not None
        place = block * BLOCK + at
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], place + done)

    def read(self, block: int, begin: int, end: int) -> bytes:
        assert self._file is not None
        return os.pread(self._file.fileno(), end - begin, block * BLOCK + begin)
