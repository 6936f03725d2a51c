"""The ends of connections that are not read: a reset, or both directions shut.

The watchers of the loop do not report these without reading or writing. So there is one epoll object for all such
connections, and the loop watches that. Each is registered for no event: the kernel then reports EPOLLERR and EPOLLHUP
alone, and bytes that come cost nothing. A peer that sends no more (FIN) has not ended: it may still wait for answers.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

from gevent import get_hub

from gmux.scheduler import READ

#: Ends dealt with in one turn of the loop; each takes 20 us.
MAX_AT_ONCE = 16


class Ends:
    """One for all connections of a process."""

    __slots__ = ("_ended", "_epoll", "_watcher")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ended: dict[int, Callable[[], None]] = {}
        self._watcher: Any = get_hub().loop.io(self._epoll.fileno(), READ)
        self._watcher.start(self._look)

    def watch(self, descriptor: int, ended: Callable[[], None]) -> None:
        """Call `ended` once, from the loop, when that connection has ended; it must not switch greenlets."""
        self._ended[descriptor] = ended
        self._epoll.register(descriptor, 0)

    def unwatch(self, descriptor: int) -> None:
        """Call it before it is read again or closed: a copy in another process would keep it registered."""
        if self._ended.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _look(self) -> None:
        # Those that are left are there in the next turn of the loop.
        for descriptor, _ in self._epoll.poll(0, MAX_AT_ONCE):
            ended = self._ended.get(descriptor)
            # What one of them did may have unwatched the next.
            if ended is not None:
                self.unwatch(descriptor)
                ended()

    def close(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        self._epoll.close()
