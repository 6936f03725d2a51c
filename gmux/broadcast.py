"""Messages of the target for all clients of a route, on their way: `--unsolicited broadcast`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

from gmux.ratelimit import LimitedWarnings
from gmux.scheduler import Share, Task

#: Bytes of messages that wait until all clients have been given those before. A target may send them faster than they
#: can be given to thousands of clients.
MAX_WAITING = 1024 * 1024


class Receiver(Protocol):
    def tell(self, message: bytes) -> None:
        """Give it a message that it did not ask for. It must not switch greenlets or raise."""


class Broadcast(Task):
    """Gives each message to all who are there when its turn comes, for a slice in each turn of the loop."""

    __slots__ = ("_receivers", "_rest", "_size", "_waiting", "_warn")

    def __init__(self, share: Share, receivers: Callable[[], Collection[Receiver]], warn: LimitedWarnings) -> None:
        super().__init__(share, is_target=False)
        self._receivers = receivers
        self._warn = warn
        self._waiting: deque[bytes] = deque()
        self._size = 0
        # Who is still to be given the first one; None while nothing waits.
        self._rest: Iterator[Receiver] | None = None

    def add(self, message: bytes) -> None:
        """Give `message` to all, or drop it where too much waits. Not now: what came before it is delivered first."""
        if self._waiting and self._size + len(message) > MAX_WAITING:
            self._warn(
                "upstream/answer",
                f"a message for all clients is dropped: {self._size} bytes of others wait to be sent to them",
            )
            return
        self._waiting.append(message)
        self._size += len(message)
        if self._rest is None:
            self._rest = iter(())
            self.later(self._begin)

    def _begin(self) -> None:
        self._rest = iter(tuple(self._receivers()))
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting:
            message = self._waiting[0]
            assert self._rest is not None
            for receiver in self._rest:
                receiver.tell(message)
                if self.share.scheduler.is_step_over():
                    self.later(self._go_on)
                    return
            self._waiting.popleft()
            self._size -= len(message)
            self._rest = iter(tuple(self._receivers()))
        self._rest = None
