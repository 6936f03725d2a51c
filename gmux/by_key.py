"""Several requests in flight on one upstream connection, answered in any order: an answer has its request's key.

One key is in flight once on a connection; a second request with it takes another connection, or waits. A request whose
answer does not come in time leaves the connection in service, and its key stays reserved there for a while: a late
answer is dropped, and never becomes that of a new request with the same key.
"""

from __future__ import annotations

import socket
from collections.abc import Hashable
from typing import Protocol, cast

from gmux.codecs.base import AnswerDecoder, KeyedPart, KeyedRequest, Part, Unsolicited
from gmux.deadlines import Deadlines
from gmux.errors import BadAnswer, ExchangeError, UpstreamClosed
from gmux.exchange import Exchange
from gmux.pipelined import PipelinedUpstream, PipelineOwner
from gmux.upstream import Traits

#: Requests that time out, one after the other and without any message of the target between, before the connection is
#: taken for dead. One that is lost is no reason to lose what else is in flight.
MAX_MUTE = 3

#: Keys that are reserved on a connection at a time, before it takes no more requests and is replaced. They would grow
#: without end on a connection that stays open, with no --late-window or under a flood of timeouts.
MAX_LATE = 4096


class KeyedOwner(PipelineOwner, Protocol):
    """What such a connection asks of its pool besides. No call may switch greenlets."""

    def late(self, upstream: KeyedUpstream, message: bytes) -> None:
        """An answer came that fits no request, as one does whose request was given up."""

    def unblocked(self, upstream: KeyedUpstream, key: Hashable) -> None:
        """The key is reserved no more: a request with it may fit."""


class KeyedUpstream(PipelinedUpstream):
    """`is_worn`: too many keys are reserved, so it is replaced when nothing is in flight."""

    __slots__ = ("is_worn", "_alone", "_in_flight", "_late", "_mute")

    _owner: KeyedOwner

    def __init__(self, owner: KeyedOwner, sock: socket.socket, decoder: AnswerDecoder, traits: Traits) -> None:
        super().__init__(owner, sock, decoder, traits)
        self.is_worn = False
        self._in_flight: dict[Hashable, Exchange] = {}
        # The exchange that nothing may be put beside: a greeting.
        self._alone: Exchange | None = None
        # Requests that timed out since the last message of the target.
        self._mute = 0
        self._late: Deadlines[Hashable] = Deadlines(traits.late_window, self._late_over)

    @property
    def has_place(self) -> bool:
        """Whether it may take a request whose key it does not hold."""
        return (
            self.load < self._depth
            and not self.is_closing
            and not self.is_worn
            and self._alone is None
            and not (self.is_aged and self.load)
        )

    def holds(self, key: Hashable) -> bool:
        """Whether the key is in flight or reserved here."""
        return key in self._in_flight or (bool(self._late) and key in self._late)

    def fits(self, exchange: Exchange) -> bool:
        return self.has_place and not self.holds(cast(KeyedRequest, exchange.request).key)

    def give_up(self, exchange: Exchange, error: ExchangeError) -> None:
        key = cast(KeyedRequest, exchange.request).key
        if self._in_flight.get(key) is not exchange:
            return
        if exchange.end > self._written or exchange is self._alone:
            # What comes behind a request that is not out whole would be a part of it to the target. And one that is
            # alone is gmux's own: it asked whether the connection is any good.
            self.fail(error)
            return
        self._mute += 1
        if self._mute >= MAX_MUTE:
            self.fail(UpstreamClosed(f"the target said nothing while {self._mute} requests timed out"))
            return
        self._reserve(key, exchange, error)

    def discard(self, exchange: Exchange, error: ExchangeError) -> None:
        # Its client has left, which says nothing of the target and is no reason to fail others.
        key = cast(KeyedRequest, exchange.request).key
        if self._in_flight.get(key) is not exchange:
            return
        if exchange.end > self._written:
            self._owner.abandon(exchange)  # again later; until it is out, its place is taken
        else:
            self._reserve(key, exchange, error)

    def _reserve(self, key: Hashable, exchange: Exchange, error: ExchangeError) -> None:
        """End the exchange; its answer may come late, and its key is nobody's until then."""
        del self._in_flight[key]
        self._late.add(key)
        self.load -= 1
        self._owner.answered(exchange)
        if len(self._late) >= MAX_LATE:
            self.is_worn = True
        if self.load:
            self._owner.has_room(self)
        else:
            self._owner.freed(self)
        exchange.asker.fail(exchange, error)

    @property
    def is_clean(self) -> bool:
        return super().is_clean and not self._late

    def _admit(self, exchange: Exchange) -> None:
        self._in_flight[cast(KeyedRequest, exchange.request).key] = exchange
        if not exchange.request.pipelines:
            self._alone = exchange

    def _collect(self, parts: list[tuple[Exchange, Part]]) -> str:
        decoder = self._decoder
        owner = self._owner
        while True:
            if decoder.data and self._scheduler.is_step_over():
                self._put_off()
                return ""
            part = cast("KeyedPart | Unsolicited | None", decoder.next_event())
            if part is None:
                return ""
            self._mute = 0
            if isinstance(part, Unsolicited):
                if reason := owner.unsolicited(self, part):
                    raise BadAnswer(reason)
                continue
            exchange = self._in_flight.get(part.key)
            if exchange is None or (exchange.end > self._written and not self._is_out(exchange)):
                owner.late(self, part.data)
                if part.key in self._late:
                    self._late.discard(part.key)
                    owner.unblocked(self, part.key)
                continue
            del self._in_flight[part.key]
            self.load -= 1
            if exchange is self._alone:
                self._alone = None
            exchange.answered = True
            owner.answered(exchange)
            if self.verbose:
                owner.saw(self, exchange, part.data, True)
            parts.append((exchange, part))
            if exchange.end > self._written:
                return "the target answered before it had the whole request"

    def _late_over(self, key: Hashable) -> None:
        self._owner.unblocked(self, key)

    def _dismiss(self) -> list[Exchange]:
        rest = list(self._in_flight.values())
        self._in_flight.clear()
        self._alone = None
        return rest

    def _may_go_again_first(self, exchange: Exchange) -> bool:
        return self._may_go_again(exchange)
