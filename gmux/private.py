"""Upstream connections that are a client's own, because the target has authenticated the connection for it.

Such a connection keeps its permit and its slot until it has ended, and nobody else gets it, neither here nor in another
process. Its client's requests go on it, and it ends with the client.

    state     left by
    busy      the end of the answer -> resting, or waiting where there is no rest
    resting   --request-delay is over -> waiting, or busy where the next request came meanwhile
    waiting   the client's next request -> busy
              --private-timeout, the time for which the target keeps it, the client is gone -> retired

In each state the end of the connection ends it, and a request that came in its rest goes on another one. Nothing here
switches greenlets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from gevent import get_hub

from gmux.deadlines import Deadlines
from gmux.exchange import Asker, Exchange
from gmux.ratelimit import LimitedWarnings
from gmux.upstream import Upstream, safe_idle_time

#: Why one ends on which something comes that nobody asked for, before a request.
NOISE = "something came that its client had not asked for"


class Tie:
    """A client and its connection. `exchange` is what waits for the end of a rest; `timer` runs when it is not busy."""

    __slots__ = ("asker", "upstream", "exchange", "timer", "is_resting")

    def __init__(self, asker: Asker, upstream: Upstream) -> None:
        self.asker = asker
        self.upstream = upstream
        self.exchange: Exchange | None = None
        self.timer: Any = None
        self.is_resting = False


class PrivateConnections:
    """Those of one pool, which makes it. `queue_timed_out` and `send_again` take a request that cannot wait any longer.

    `size` is the number of connections that the pool may have, `timeout` and `rest` are seconds.
    """

    def __init__(
        self,
        size: int,
        timeout: float,
        rest: float,
        queue_timeout: float,
        queue_timed_out: Callable[[Exchange], None],
        send_again: Callable[[Iterable[Exchange]], None],
        log: logging.Logger,
        warn: LimitedWarnings,
    ) -> None:
        #: By the client. Mostly empty, which is all that a request pays for that has nothing to do with it.
        self.ties: dict[Asker, Tie] = {}
        self._by_upstream: dict[Upstream, Tie] = {}
        self._size = size
        self._timeout = timeout
        self._rest = rest
        self._queue_timed_out = queue_timed_out
        self._send_again = send_again
        self._log = log
        self._warn = warn
        self._has_warned = False
        self._parked: Deadlines[Exchange] = Deadlines(queue_timeout, self._parked_too_long)

    def __contains__(self, upstream: Upstream) -> bool:
        return upstream in self._by_upstream

    def keep(self, upstream: Upstream, asker: Asker) -> None:
        """The connection is the asker's own, and has nothing in flight."""
        tie = self._by_upstream.get(upstream)
        if tie is None:
            tie = self.ties[asker] = self._by_upstream[upstream] = Tie(asker, upstream)
            self._log.info("target connection belongs to %s from now on: %s", asker.name, upstream.name)
        if upstream.idle_limit <= self._rest:
            upstream.retire(f"the target keeps it for {upstream.idle_limit:g} s, which --request-delay takes")
        elif self._rest:
            tie.is_resting = True
            self._start(tie, self._rest, self._rested)
        else:
            self._await(tie)

    def use(self, exchange: Exchange) -> bool:
        """Put the exchange on its asker's own connection; false: it has none, or it has just ended."""
        tie = self.ties.get(exchange.asker)
        if tie is None:
            if len(self.ties) >= self._size and not self._has_warned:
                self._has_warned = True
                self._warn(
                    "pool/queue",
                    f"{exchange.asker.name}: waits, as clients have all {self._size} connections to the target for"
                    " themselves (--pool-size, --private-timeout) (pool/queue)",
                )
            return False
        if tie.is_resting:
            tie.exchange = exchange
            self._parked.add(exchange)
            return True
        self._stop(tie)
        if tie.upstream.is_stale() and not tie.upstream.catch_up():
            tie.upstream.close(NOISE)  # mostly it has ended already
            return False
        tie.upstream.send(exchange)
        return True

    def dismiss(self, asker: Asker) -> None:
        """The asker sends no more requests."""
        tie = self.ties.get(asker)
        if tie is not None and tie.timer is not None:  # of one that is busy the pool is told when it is free
            tie.upstream.retire("the client that it belongs to is gone")

    def abandon(self, exchange: Exchange) -> bool:
        """Forget what waits for the end of a rest, if it does."""
        if exchange not in self._parked:
            return False
        self._unpark(exchange)
        return True

    def retire_free(self, reason: str) -> None:
        """End those that have nothing to do."""
        for tie in list(self.ties.values()):
            if tie.timer is not None and tie.exchange is None:
                tie.upstream.retire(reason)

    def aged(self, upstream: Upstream, reason: str) -> None:
        """The connection is to be replaced: now, where it only waits."""
        tie = self._by_upstream.get(upstream)
        if tie is not None and tie.timer is not None and tie.exchange is None:
            upstream.retire(reason)

    def drop(self, upstream: Upstream) -> None:
        """The connection ends, or has ended."""
        tie = self._by_upstream.pop(upstream, None)
        if tie is None:
            return
        self._stop(tie)
        self._has_warned = False
        if self.ties.get(tie.asker) is tie:
            del self.ties[tie.asker]
        exchange = tie.exchange
        if exchange is not None:
            self._parked.discard(exchange)
            self._send_again((exchange,))

    # The clocks. Each connection has a timer of its own: there are few.

    def _start(self, tie: Tie, seconds: float, over: Callable[[Tie], None]) -> None:
        tie.timer = get_hub().loop.timer(seconds)
        tie.timer.start(over, tie)

    def _stop(self, tie: Tie) -> None:
        if tie.timer is not None:
            tie.timer.stop()
            tie.timer.close()
            tie.timer = None

    def _rested(self, tie: Tie) -> None:
        self._stop(tie)
        tie.is_resting = False
        exchange = tie.exchange
        if exchange is None:
            self._await(tie)
        elif tie.upstream.is_stale() and not tie.upstream.catch_up():
            tie.upstream.close(NOISE)  # mostly it has ended already; `drop` deals with the exchange
        else:
            self._unpark(exchange)
            tie.upstream.send(exchange)

    def _await(self, tie: Tie) -> None:
        self._start(tie, max(min(self._timeout, self._kept(tie.upstream)), 0), self._waited)

    def _kept(self, upstream: Upstream) -> float:
        """Seconds after its rest for which the target keeps it."""
        return safe_idle_time(upstream.idle_limit) - self._rest

    def _waited(self, tie: Tie) -> None:
        upstream = tie.upstream
        if self._kept(upstream) > self._timeout:
            upstream.retire(f"its client sent no request for {self._timeout:g} s (--private-timeout)")
        else:
            upstream.retire(f"idle, and the target keeps it for {upstream.idle_limit:g} s")

    def _unpark(self, exchange: Exchange) -> None:
        self._parked.discard(exchange)
        self.ties[exchange.asker].exchange = None

    def _parked_too_long(self, exchange: Exchange) -> None:
        self._unpark(exchange)
        self._queue_timed_out(exchange)
