"""The pool when several requests may be in flight on one connection: which connection takes a request.

A permit is held by each connection that is not idle, as in the strict pool; a request that is put beside others needs
none. A new connection is made before requests share one, unless connections are to be filled first.

By order, requests share one only with the licence, which a probe gets where the codec has one: when requests wait, the
first connection that is free and comes when the licence is due serves the probe before it serves them.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from operator import attrgetter
from typing import cast

import gevent

from gmux.by_load import ByLoad
from gmux.by_order import OrderedUpstream
from gmux.codecs.base import Probe
from gmux.deadlines import Deadlines
from gmux.errors import AnswerTimeout
from gmux.exchange import Exchange
from gmux.licence import Licence
from gmux.pipelined import PipelinedUpstream
from gmux.pool import Pool, PoolParts, PoolSettings
from gmux.prober import Prober
from gmux.upstream import Upstream

#: Seconds for which a request waits for a connection that is made for it, before it shares one that has room.
CONNECT_PATIENCE = 0.1


class PipelinedPool(Pool):
    def __init__(self, settings: PoolSettings, parts: PoolParts) -> None:
        super().__init__(settings, parts)
        self._awaiting: Deadlines[Exchange] = Deadlines(settings.timeout, self._await_timed_out)
        self._by_load = ByLoad(settings.pipeline, self._may_fit_others)
        # A pool of one connection needs no order of them.
        self._place: Callable[[PipelinedUpstream], None] = self._by_load.put if settings.size > 1 else _nowhere
        # The one that takes no more requests because others ask for it.
        self._lending: PipelinedUpstream | None = None
        self._has_probe = self._make_probe() is not None
        self.licence = Licence(not self._has_probe)
        self._prober = Prober(self._make_probe, self.licence, parts.log, self._probed)
        self.asked = self._awaiting.add
        self.answered: Callable[[Exchange], None] = self._awaiting.discard

    def _make_probe(self) -> Probe | None:
        return self._codec.make_probe(self._settings.pipeline, secrets.token_hex(16))

    def checkout(self, exchange: Exchange) -> None:
        if self._ties and self._private.use(exchange):
            return
        if self._lending is not None and not self._slots.has_asks():
            self._stop_lending()  # who asked has one, or is gone
        if not self._begin(exchange):
            self._queue(exchange)

    def _begin(self, exchange: Exchange) -> bool:
        """Put the exchange on a connection; or false: it must wait, perhaps for a connection that is made for it."""
        prefers = self._settings.prefer_pipeline
        if prefers and self._stack(exchange):
            return True
        if self._idle and self._use_idle(exchange):
            return True
        if prefers and (self._connecting or self._prober.is_busy):
            return False  # there will be room
        if self._open_one():
            if not prefers:
                gevent.get_hub().loop.timer(CONNECT_PATIENCE).start(self._share)
            return False
        return not prefers and self._stack(exchange)

    def _open_one(self) -> bool:
        """Make a connection, if there is one left to make; whether it is being made."""
        is_left = self._permits.counter > len(self._idle)
        return is_left and self._permits.acquire(blocking=False) and self._open()

    def _share(self) -> None:
        """Put what waits on the connections there are."""
        if not self._waiting:
            return
        for upstream in list(map(_pipelined, self._upstreams)):
            if upstream.load and not upstream.is_closing:
                self.has_room(upstream)

    def _use_idle(self, exchange: Exchange) -> bool:
        while (upstream := next((u for u in reversed(self._idle) if _pipelined(u).fits(exchange)), None)) is not None:
            self._permits.acquire(blocking=False)
            del self._idle[upstream]
            if not upstream.is_stale() or upstream.catch_up():
                upstream.send(exchange)
                self._place(_pipelined(upstream))
                return True
        return False

    def _stack(self, exchange: Exchange) -> bool:
        """Put the exchange beside others, where the fewest are in flight; whether there was such a place."""
        # Who waits was first.
        return (
            not self._waiting and self.licence.is_granted and exchange.request.pipelines and self._put_beside(exchange)
        )

    def _put_beside(self, exchange: Exchange) -> bool:
        if self._place is _nowhere:
            for only in map(_pipelined, self._upstreams):
                if only.load and only.fits(exchange):
                    only.send(exchange)
                    return True
            return False
        upstream = self._by_load.find(exchange)
        if upstream is None:
            return False
        upstream.send(exchange)
        self._place(upstream)
        return True

    def _may_fit_others(self, upstream: PipelinedUpstream) -> bool:
        """Whether a busy connection that does not take one request may take another one."""
        return False

    # What a connection calls (`pipelined.PipelineOwner`), beside `asked` and `answered`.

    def has_room(self, upstream: PipelinedUpstream) -> None:
        waiting = self._waiting
        while waiting and upstream.fits(exchange := next(iter(waiting))):
            del waiting[exchange]
            upstream.send(exchange)
        self._place(upstream)

    def doubt(self, upstream: PipelinedUpstream, reason: str) -> None:
        if self.licence.is_granted:
            text = "a request may be lost among those in flight together (%s): requests go one by one; next try in %g s"
            self._log.warning(text, reason, self.licence.refuse())

    # The licence.

    def _seek_licence(self, upstream: PipelinedUpstream) -> bool:
        """Try for the licence, if it is time to; whether a probe has the connection, which is free, for now."""
        # One request that waits for a new connection is no sign that any would be put behind another.
        if not self.licence.is_due or not (upstream.used or len(self._waiting) > 1):
            return False
        if self._has_probe:
            return self._prober.begin(upstream)
        self.licence.grant()
        self._log.info("requests go several at a time again")
        return False

    def _probed(self, upstream: PipelinedUpstream) -> None:
        """A probe has ended, and its connection is free."""
        self.freed(upstream)
        self._share()

    def bound(self, upstream: Upstream, exchange: Exchange) -> None:
        if upstream is self._lending:
            # Like each that is a client's own it is not for others. To end it now would cost the client its handshake.
            self._stop_lending()
        if _pipelined(upstream).is_held:
            # Not retired: it is the target's answer that ends it, and the probe must know.
            upstream.close("the target takes the connection of the probe for one user's")
        else:
            super().bound(upstream, exchange)

    def closing(self, upstream: Upstream, reason: str) -> None:
        super().closing(upstream, reason)
        self._prober.ended(upstream, reason)

    def ended(self, upstream: Upstream, reason: str) -> None:
        super().ended(upstream, reason)
        self._prober.ended(upstream, reason)

    def drain(self) -> None:
        self._prober.stop()
        super().drain()

    def stop(self) -> None:
        self._prober.stop()
        super().stop()

    # What differs from the strict pool.

    def lend(self) -> None:
        super().lend()
        if self._idle or not self._slots.next_ask(self._state()):
            return
        # Under a load that does not end none is ever free: one takes no more requests until it is.
        open_ones = [u for u in map(_pipelined, self._upstreams) if not u.is_closing and u not in self._private]
        if open_ones and not any(upstream.is_aged for upstream in open_ones):
            self._lending = min(open_ones, key=attrgetter("load"))
            self._lending.is_aged = True

    def _stop_lending(self) -> None:
        if self._lending is not None:
            self._lending.is_aged = False
            self._place(self._lending)
            self._lending = None

    def _stop_clocks(self, upstream: Upstream) -> None:
        super()._stop_clocks(upstream)
        self._by_load.discard(upstream)

    def _aged(self, upstream: Upstream) -> None:
        if upstream is self._lending:
            self._lending = None  # its age replaces it, also when no other process asks any more
        super()._aged(upstream)

    def _wrap(self, sock: socket.socket) -> Upstream:
        return OrderedUpstream(self, sock, self._codec.answer_decoder(), self._traits)

    def _hand_over(self, upstream: Upstream) -> None:
        upstream.is_aged = False  # or it would have been replaced, or lent
        if upstream is self._lending:
            self._lending = None
        if self._waiting:
            if upstream.is_stale() and not upstream.catch_up():
                return
            if not self.licence.is_granted and self._seek_licence(_pipelined(upstream)):
                return
            self.has_room(_pipelined(upstream))
        if not upstream.is_closing and not _pipelined(upstream).load:
            self._make_idle(upstream)
        if self._waiting and self._settings.prefer_pipeline and not self._connecting:
            self._open_one()  # what waits could not share

    def _needed(self, waiting: int) -> int:
        return -(-waiting // self._settings.pipeline) if self._settings.prefer_pipeline else waiting

    def _settle(self) -> None:
        super()._settle()
        if self._retry_timer is not None and self._waiting:
            self._share()  # no connection is made now

    def _await_timed_out(self, exchange: Exchange) -> None:
        limit = f"{self._settings.timeout:g} s (--timeout)"
        upstream = cast(PipelinedUpstream, exchange.upstream)
        upstream.give_up(exchange, AnswerTimeout(f"the target did not answer for {limit}"))


def _pipelined(upstream: Upstream) -> PipelinedUpstream:
    return cast(PipelinedUpstream, upstream)


def _nowhere(upstream: PipelinedUpstream) -> None:
    """Nothing is to be done."""
