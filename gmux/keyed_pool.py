"""The pool when answers find their requests by key: a request waits for room, and for its key to be free."""

from __future__ import annotations

import socket
from collections.abc import Hashable
from typing import cast

import gevent

from gmux.by_key import KeyedUpstream
from gmux.codecs.base import KeyedRequest
from gmux.exchange import Exchange
from gmux.keyed_line import KeyedLine
from gmux.pipelined import PipelinedUpstream
from gmux.pipelined_pool import PipelinedPool
from gmux.pool import PoolParts, PoolSettings
from gmux.upstream import Upstream


class KeyedPool(PipelinedPool):
    _waiting: KeyedLine

    def __init__(self, settings: PoolSettings, parts: PoolParts) -> None:
        super().__init__(settings, parts)
        # Connections on which a key became free that a request waits for.
        self._unblocked: set[KeyedUpstream] = set()
        self.answered = self._answered

    def _make_line(self) -> KeyedLine:
        return KeyedLine(self._settings.queue_timeout, self._queue_timed_out)

    def _use_idle(self, exchange: Exchange) -> bool:
        return not self._is_key_queued(exchange) and super()._use_idle(exchange)

    def _stack(self, exchange: Exchange) -> bool:
        return not self._is_key_queued(exchange) and self._put_beside(exchange)

    def _may_fit_others(self, upstream: PipelinedUpstream) -> bool:
        return cast(KeyedUpstream, upstream).has_place

    def _is_key_queued(self, exchange: Exchange) -> bool:
        """Whether others with its key wait. They were first, so it waits too."""
        return bool(self._waiting) and self._waiting.has_key(cast(KeyedRequest, exchange.request).key)

    def has_room(self, upstream: PipelinedUpstream) -> None:
        waiting = self._waiting
        keyed = cast(KeyedUpstream, upstream)
        while waiting and keyed.has_place and (exchange := waiting.take(keyed, keyed.holds)) is not None:
            keyed.send(exchange)
        self._place(keyed)

    def _answered(self, exchange: Exchange) -> None:
        self._awaiting.pop(exchange, None)
        if self._waiting:
            self._waiting.released(exchange.upstream, cast(KeyedRequest, exchange.request).key)

    def _hand_over(self, upstream: Upstream) -> None:
        if cast(KeyedUpstream, upstream).is_worn:
            upstream.retire("too many of its requests had no answer")
        else:
            super()._hand_over(upstream)

    def late(self, upstream: KeyedUpstream, message: bytes) -> None:
        what = f"{self._codec.describe(message)}, {upstream.name}"
        self.warn("upstream/answer", f"an answer that fits no request is dropped, late perhaps: {what}")

    def unblocked(self, upstream: KeyedUpstream, key: Hashable) -> None:
        if not self._waiting.has_key(key):
            return
        self._waiting.released(upstream, key)
        # Not now: the connection is at its next message. And once for all of this turn: a target that stood still may
        # send thousands of late answers, with thousands of requests in the queue.
        if not self._unblocked:
            gevent.get_hub().loop.run_callback(self._fill_unblocked)
        self._unblocked.add(upstream)

    def _fill_unblocked(self) -> None:
        upstreams, self._unblocked = self._unblocked, set()
        for upstream in upstreams:
            if upstream in self._idle:
                del self._idle[upstream]
                self._permits.acquire(blocking=False)
                self._hand_over(upstream)
            elif upstream.load:
                self.has_room(upstream)

    def _wrap(self, sock: socket.socket) -> Upstream:
        return KeyedUpstream(self, sock, self._codec.answer_decoder(), self._traits)
