"""Connections that may take one more request beside those in flight: the one with the fewest in flight comes first."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable

from gmux.exchange import Exchange
from gmux.pipelined import PipelinedUpstream
from gmux.upstream import Upstream


class ByLoad:
    """Groups the connections by their load. `put` moves one to its group, and `find` those that `put` missed.

    A connection that an exchange does not fit stays here when `may_fit_others` says that another exchange may fit.
    """

    def __init__(self, depth: int, may_fit_others: Callable[[PipelinedUpstream], bool]) -> None:
        self._depth = depth
        self._may_fit_others = may_fit_others
        self._loads: dict[PipelinedUpstream, int] = {}
        self._groups: defaultdict[int, OrderedDict[PipelinedUpstream, None]] = defaultdict(OrderedDict)
        # No connection here has a smaller load.
        self._lowest = 1

    def put(self, upstream: PipelinedUpstream) -> None:
        """Move the connection to the group of its load, which has changed."""
        load = upstream.load
        before = self._loads.get(upstream)
        if before == load:
            return
        if before is not None:
            del self._groups[before][upstream]
        if 0 < load < self._depth:
            self._loads[upstream] = load
            self._groups[load][upstream] = None
            if load < self._lowest:
                self._lowest = load
        elif before is not None:
            del self._loads[upstream]

    def discard(self, upstream: Upstream) -> None:
        """The connection takes no more, for now or for ever."""
        load = self._loads.pop(upstream, None)  # type: ignore[call-overload]
        if load is not None:
            del self._groups[load][upstream]  # type: ignore[arg-type]

    def find(self, exchange: Exchange) -> PipelinedUpstream | None:
        """The connection with the fewest in flight which the exchange fits."""
        while self._lowest < self._depth and not self._groups[self._lowest]:
            self._lowest += 1
        for load in range(self._lowest, self._depth):
            group = self._groups[load]
            passed = 0
            while passed < len(group):
                upstream = next(iter(group))
                if upstream.load != load:
                    self.put(upstream)
                elif upstream.fits(exchange):
                    return upstream
                elif self._may_fit_others(upstream):
                    group.move_to_end(upstream)
                    passed += 1
                else:
                    self.discard(upstream)
        return None
