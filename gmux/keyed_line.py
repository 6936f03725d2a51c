"""The requests that wait for a connection by key: first come, first served among those whose key is free.

A key may be held by some connections and free on others, so each connection has its own view of the line. Requests with
one key stand together in a group. The log has the groups in the order in which they came; a view has a place in the
log, up to which it has seen each group, and a heap of those groups that are to be looked at again. A group that a view
has passed over is one whose key its connection holds, and `released` brings it back. So nobody walks over the requests
that wait: the cost of a request is that of the groups which are passed over, once for each connection.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from heapq import heappop, heappush
from math import inf
from typing import cast

from gmux.codecs.base import KeyedRequest
from gmux.deadlines import Deadlines
from gmux.exchange import Exchange

#: Groups that have left and are in the log still, above the number of those that wait, before the log is made again.
SPARE_GROUPS = 64


class _Group:
    """Those with one key, each with its number, in their order. `number` is that of its place in the log."""

    __slots__ = ("key", "members", "number")

    def __init__(self, key: Hashable, number: int) -> None:
        self.key = key
        self.members: OrderedDict[Exchange, int] = OrderedDict()
        self.number = number

    @property
    def first(self) -> int:
        return next(iter(self.members.values()))


class _View:
    """What a connection has not looked at: the log from `at` on, and the groups of `again` by their first number."""

    __slots__ = ("at", "again")

    def __init__(self) -> None:
        self.at = 0
        self.again: list[tuple[int, _Group]] = []


def _key(exchange: Exchange) -> Hashable:
    return cast(KeyedRequest, exchange.request).key


class KeyedLine(Deadlines[Exchange]):
    """A queue with a clock, as its base class. What is added and removed costs the same however many wait."""

    def __init__(self, seconds: float, expired: Callable[[Exchange], None]) -> None:
        super().__init__(seconds, expired)
        self._groups: dict[Hashable, _Group] = {}
        self._log: list[_Group] = []
        self._views: dict[object, _View] = {}
        self._lowest = self._highest = 0

    def has_key(self, key: Hashable) -> bool:
        """Whether a request with this key waits."""
        return key in self._groups

    def take(self, connection: object, holds: Callable[[Hashable], bool]) -> Exchange | None:
        """Remove and return the first whose key the connection does not hold."""
        view = self._views.get(connection)
        if view is None:
            view = self._views[connection] = _View()
        log, again = self._log, view.again
        while True:
            group = log[view.at] if view.at < len(log) else None
            if group is not None and (not again or group.number < again[0][0]):
                view.at += 1
                number = group.number
            elif again:
                number, group = heappop(again)
            else:
                return None
            if not group.members or holds(group.key):
                continue
            if group.first > number:  # those before have left
                heappush(again, (group.first, group))
                continue
            exchange = next(iter(group.members))
            self.discard(exchange)
            return exchange

    def released(self, connection: object, key: Hashable) -> None:
        """The connection does not hold this key any more."""
        group = self._groups.get(key)
        view = self._views.get(connection)
        if group is not None and view is not None:
            heappush(view.again, (group.first, group))

    # What differs from the queue that knows no keys.

    def add(self, thing: Exchange) -> None:
        self.discard(thing)
        super().add(thing)
        self._highest += 1
        key = _key(thing)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key, self._highest)
            self._log.append(group)
        group.members[thing] = self._highest

    def add_first(self, thing: Exchange, since: float = inf) -> None:
        self.discard(thing)
        super().add_first(thing, since)
        self._lowest -= 1
        key = _key(thing)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key, self._lowest)
        group.number = self._lowest
        group.members[thing] = self._lowest
        group.members.move_to_end(thing, last=False)
        # It is rare, so all may look at the line from its head again.
        self._log.insert(0, group)
        self._views.clear()

    def discard(self, thing: Exchange) -> None:
        if self.pop(thing, None) is not None:
            self._left(thing)

    def pop_first(self) -> Exchange:
        thing = super().pop_first()
        self._left(thing)
        return thing

    def _left(self, thing: Exchange) -> None:
        key = _key(thing)
        group = self._groups[key]
        del group.members[thing]
        if not group.members:
            del self._groups[key]
            if not self._groups or len(self._log) > 2 * len(self._groups) + SPARE_GROUPS:
                self._tidy()

    def _tidy(self) -> None:
        """Make the log again without the groups that have left. The views begin again at its head."""
        self._log = list(dict.fromkeys(group for group in self._log if self._groups.get(group.key) is group))
        self._views.clear()
