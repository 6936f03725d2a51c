"""The memory that clients take: one count for all of a worker, with a limit."""

from __future__ import annotations

import ctypes

#: Bytes for each client while it is connected: its objects, its greenlet, and messages up to SMALL.
ALLOWANCE = 16 * 1024

#: Bytes of requests of one client that its allowance covers; they are not counted on their way.
SMALL = 4 * 1024

#: Bytes that are free where memory is not scarce: more than one read.
MARGIN = 128 * 1024

#: Free bytes from which on the system gets them back: the C library keeps those between pieces that are in use.
TRIM_SIZE = 32 * 1024 * 1024

#: None where the C library is not glibc.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class Memory:
    """The bytes that clients, their requests and all spools of a worker may hold in memory together.

    Who can do with less leaves room for who cannot: a part is kept for the allowances of clients that come, and of the
    rest, what could be on disk or wait in the kernel may use half.
    """

    __slots__ = ("_clients", "_peak", "_reserve", "_room", "is_scarce", "limit", "used")

    def __init__(self, limit: int, max_clients: int = 0) -> None:
        """`max_clients`: those whose allowances are kept, as far as half of the limit is enough for them."""
        self.limit = limit
        #: Beside the allowances.
        self.used = 0
        self._clients = 0
        self._reserve = min(limit // 2, max_clients * ALLOWANCE)
        self._peak = 0
        self._count(0)

    @property
    def full(self) -> str:
        """The limit that was met, in words."""
        return f"clients hold {self.limit} bytes of memory (--memory-limit)"

    def admit(self) -> bool:
        """Count a client; false, and nothing counted, when its allowance is past the limit."""
        if self.used + max(self._reserve, (self._clients + 1) * ALLOWANCE) > self.limit:
            return False
        self._count(1)
        return True

    def dismiss(self) -> None:
        """A client that was admitted is gone."""
        self._count(-1)

    def take(self, size: int) -> bool:
        """Count `size` bytes more; false, and nothing counted, when that is past the limit."""
        if self.used + size > self._room:
            return False
        self._use(size)
        return True

    def take_spare(self, size: int) -> bool:
        """The same for what can be elsewhere; false also where others may need it."""
        return self.used + size <= self._room // 2 and self.take(size)

    def give(self, size: int) -> None:
        self._use(-size)

    def trim(self) -> None:
        """Give back to the system what is free, if that may be much. To be called about once a second."""
        total = self._total
        if self._peak - total >= TRIM_SIZE:
            self._peak = total
            if _trim is not None:
                _trim(0)

    @property
    def _total(self) -> int:
        return self.used + self._clients * ALLOWANCE

    def _count(self, clients: int) -> None:
        self._clients += clients
        #: For all but the allowances.
        self._room = self.limit - max(self._reserve, self._clients * ALLOWANCE)
        self._use(0)

    def _use(self, size: int) -> None:
        self.used += size
        #: Whether nobody may read ahead: a whole read more might be too much.
        self.is_scarce = self.used + MARGIN > self._room // 2
        if self._total > self._peak:
            self._peak = self._total
