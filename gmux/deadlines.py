"""One clock for many things: each must be done within the same number of seconds from when it was added.

Because the duration is the same for all, the order of adding is the order of expiry: a deadline costs two dictionary
operations, and one timer of the loop serves them all. A request's way sets and clears several deadlines, so this is
on the hot path. Thousands that expire together do so over several turns of the loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any, TypeVar

from gevent import get_hub

from gmux.scheduler import LONE_SLICE

T = TypeVar("T")


class Deadlines(OrderedDict[T, float]):
    """Things in the order of their deadlines, each with the time when its clock was started.

    `expired(thing)` is called from the loop, without it being a member any more, for each thing that stays longer
    than `seconds`; it must not switch greenlets. With `seconds` 0 nothing expires: it is a plain queue.
    """

    def __init__(self, seconds: float, expired: Callable[[T], None]) -> None:
        super().__init__()
        self._seconds = seconds
        self._expired = expired
        self._timer: Any = None

    # Two of them are the same only when they are one; and they can be members of sets.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def add(self, thing: T) -> None:
        """Start the clock of `thing`, or start it again."""
        self[thing] = monotonic()
        self.move_to_end(thing)
        if self._timer is None and self._seconds:
            self._arm(self._seconds)

    def add_first(self, thing: T, since: float = inf) -> None:
        """Put `thing` at the head of the queue, with the deadline of what stood there.

        When that is later than the deadline of a thing that was added at the time `since`, `thing` gets the latter.
        """
        head = next(iter(self.values()), monotonic())
        self[thing] = min(head, since)
        self.move_to_end(thing, last=False)
        if self._timer is not None and since < head:
            self._timer.stop()
            self._timer.close()
            self._timer = None
        if self._timer is None and self._seconds:
            self._arm(max(self._wait(), 0))

    def discard(self, thing: T) -> None:
        """Stop the clock of `thing`, if it runs."""
        self.pop(thing, None)

    def pop_first(self) -> T:
        """Remove and return what was added first. Raises KeyError when there is nothing."""
        return self.popitem(last=False)[0]

    def _arm(self, seconds: float) -> None:
        loop = get_hub().loop
        # After all else of its turn: what came in time is seen first, also when the process was held up.
        self._timer = loop.timer(seconds, priority=loop.MINPRI)
        self._timer.start(self._on_timer)

    def _on_timer(self) -> None:
        # The timer is left running when things are discarded; here it finds out what is left to wait for.
        self._timer = None
        end = monotonic() + LONE_SLICE
        try:
            while self and self._wait() <= 0:
                self._expired(self.pop_first())
                if monotonic() > end:
                    break
        finally:
            # Also when `expired` raised: the loop reports it, and the others must still expire.
            if self and self._timer is None:
                self._arm(max(self._wait(), 0))

    def _wait(self) -> float:
        """Seconds until the first thing expires."""
        return next(iter(self.values())) + self._seconds - monotonic()
