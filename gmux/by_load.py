"""Connections that may take one more request beside those in flight: the one with the fewest in flight comes first."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable

from gmux.exchange import Exchange
from gmux.pipelined import PipelinedUpstream
from gmux.upstream import Upstream


class ByLoad:
    """Each connection stands with those of its load. `put` keeps that true; what has become untrue is mended by `find`.

    `is_picky` says of a connection that an exchange does not fit whether another one may fit: then it stays.
    """

    def __init__(self, depth: int, is_picky: Callable[[PipelinedUpstream], bool]) -> None:
        self._depth = depth
        self._is_picky = is_picky
        self._loads: dict[PipelinedUpstream, int] = {}
        self._standing: defaultdict[int, OrderedDict[PipelinedUpstream, None]] = defaultdict(OrderedDict)
        # None stands with a smaller load.
        self._lowest = 1

    def put(self, upstream: PipelinedUpstream) -> None:
        """The connection has so many in flight as it says, and may have room."""
        load = upstream.load
        before = self._loads.get(upstream)
        if before == load:
            return
        if before is not None:
            del self._standing[before][upstream]
        if 0 < load < self._depth:
            self._loads[upstream] = load
            self._standing[load][upstream] = None
            if load < self._lowest:
                self._lowest = load
        elif before is not None:
            del self._loads[upstream]

    def discard(self, upstream: Upstream) -> None:
        """The connection takes no more, for now or for ever."""
        load = self._loads.pop(upstream, None)  # type: ignore[call-overload]
        if load is not None:
            del self._standing[load][upstream]  # type: ignore[arg-type]

    def find(self, exchange: Exchange) -> PipelinedUpstream | None:
        """The connection with the fewest in flight which the exchange fits."""
        while self._lowest < self._depth and not self._standing[self._lowest]:
            self._lowest += 1
        for load in range(self._lowest, self._depth):
            standing = self._standing[load]
            passed = 0
            while passed < len(standing):
                upstream = next(iter(standing))
                if upstream.load != load:
                    self.put(upstream)
                elif upstream.fits(exchange):
                    return upstream
                elif self._is_picky(upstream):
                    standing.move_to_end(upstream)
                    passed += 1
                else:
                    self.discard(upstream)
        return None
