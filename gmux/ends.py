"""The ends of connections that are not read: a reset, or both directions shut. The loop tells only who reads or writes.

One epoll object for all of them, watched by the loop. They are registered for nothing, so the kernel reports EPOLLERR
and EPOLLHUP alone, and bytes that come cost nothing. That a peer sends no more (FIN) is no end: it may still
wait for answers.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

from gevent import get_hub

READ = 1


class Ends:
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
        """Before it is read again or closed: a copy in another process would keep it here."""
        if self._ended.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _look(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            ended = self._ended.get(descriptor)
            # What one of them did may have unwatched the next.
            if ended is not None:
                self.unwatch(descriptor)
                ended()

    def close(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        self._epoll.close()
