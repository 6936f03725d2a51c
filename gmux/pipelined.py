"""Several requests in flight on one upstream connection: how they are written. How answers find them is up to
subclasses, `gmux.by_order` and `gmux.by_key`.

What is sent in one turn of the loop goes out in one write. When answers come, room is filled from those who wait
before any of the answers is delivered: the target never idles while requests wait.
"""

from __future__ import annotations

import socket
from typing import Protocol

from gevent import get_hub

from gmux import net
from gmux.codecs.base import AnswerDecoder, Part
from gmux.errors import BadAnswer, ExchangeError, UpstreamClosed, describe_fault
from gmux.exchange import Exchange
from gmux.licence import Licence
from gmux.upstream import Owner, Traits, Upstream

#: How often a safe request is sent again because the connection closed while others were before it. A target that takes
#: few requests on a connection needs some; one that never answers shall not have it for ever.
MAX_REPEATS = 8

#: Bytes of answers to a target's own messages that are held for one that does not read.
MAX_OWED = 256 * 1024

#: What `_collect` returns when the last answer made the connection its asker's own.
PRIVATE = "the connection is one client's own from now on"


class PipelineOwner(Owner, Protocol):
    """What a pipelined connection asks of its pool besides. No call may switch greenlets."""

    #: Whether requests may be put behind one another, by order.
    licence: Licence

    def has_room(self, upstream: PipelinedUpstream) -> None:
        """Put on the connection what waits and fits."""

    def asked(self, exchange: Exchange) -> None:
        """The clock of this exchange starts."""

    def answered(self, exchange: Exchange) -> None:
        """It stops."""

    def abandon(self, exchange: Exchange) -> None:
        """Its asker is gone; `discard` is called when it goes on for long."""

    def doubt(self, upstream: PipelinedUpstream, reason: str) -> None:
        """A request that was put together with others may be lost; the connection ends."""


class PipelinedUpstream(Upstream):
    """Up to `depth` exchanges in flight; `load` is their number.

    `is_held`: a probe has the connection for itself, so it is not free when nothing is in flight.
    """

    __slots__ = (
        "load",
        "is_held",
        "_depth",
        "_batch",
        "_body",
        "_is_flushing",
        "_accepted",
        "_written",
        "_owed",
    )

    _owner: PipelineOwner

    def __init__(self, owner: PipelineOwner, sock: socket.socket, decoder: AnswerDecoder, traits: Traits) -> None:
        super().__init__(owner, sock, decoder, traits)
        self.load = 0
        self.is_held = False
        self._depth = traits.depth
        # Requests of this turn of the loop, which go out together.
        self._batch: list[bytes] = []
        # The request that has the connection for itself, and its body.
        self._body: Exchange | None = None
        self._is_flushing = False
        # Bytes of all requests put on the connection, and how many of them the socket took.
        self._accepted = self._written = 0
        # Bytes that the target is owed, since the socket took all there was.
        self._owed = 0

    @property
    def may_pipeline(self) -> bool:
        """Whether the target has shown that this connection may carry several requests at a time."""
        return self._decoder.may_pipeline

    # What subclasses define.

    def fits(self, exchange: Exchange) -> bool:
        """Whether the exchange may go on the connection now."""
        raise NotImplementedError

    def _admit(self, exchange: Exchange) -> None:
        """The exchange is in flight."""
        raise NotImplementedError

    def _collect(self, parts: list[tuple[Exchange, Part]]) -> str:
        """Frame what is there into `parts`. Returns why the connection cannot go on, or nothing. Raises BadAnswer."""
        raise NotImplementedError

    def _dismiss(self) -> list[Exchange]:
        """Take all that is in flight out of what answers find, in the order of sending."""
        raise NotImplementedError

    def give_up(self, exchange: Exchange, error: ExchangeError) -> None:
        """The exchange has taken too long: it fails by `error`. The connection goes on where that is safe."""
        raise NotImplementedError

    def _cut_off(self, reason: str) -> None:
        """The target ended the connection without a word while answers are due."""

    # Writing.

    def send(self, exchange: Exchange) -> None:
        data = exchange.request.data
        if self.verbose:
            self._owner.saw(self, exchange, data, False)
        self._admit(exchange)
        exchange.upstream = self
        self._owner.asked(exchange)
        self.load += 1
        self._batch.append(data)
        exchange.begin = self._accepted
        self._accepted += len(data)
        if exchange.body is not None:
            self._body = exchange
            self._accepted += len(exchange.body)
        exchange.end = self._accepted
        self.used += 1
        if not self._is_flushing:
            self._is_flushing = True
            get_hub().loop.run_callback(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        if not self._batch or self._writer is not None or self.is_closing:
            return
        data = self._next_data()
        try:
            sent = self._send(data)
        except OSError:
            # Full, or broken: then what the target sent before is read first, and its end seen there.
            sent = 0
        self._written += sent
        self._kick()
        if sent != len(data) or self._body is not None:
            self._write_on(memoryview(data)[sent:])

    def _next_data(self) -> bytes:
        batch = self._batch
        if batch:
            data = batch[0] if len(batch) == 1 else b"".join(batch)
            batch.clear()
            return data
        if self._body is not None and self._body.body is not None:
            data = self._body.body.read()
            if data:
                return data
            self._body = None
        return b""

    def _wrote(self, size: int) -> None:
        self._written += size

    # Answers.

    def _take(self) -> None:
        decoder = self._decoder
        parts: list[tuple[Exchange, Part]] = []
        error: BadAnswer | None = None
        reason = ""
        was_busy = self.load
        try:
            reason = self._collect(parts)
        except BadAnswer as bad:
            error = bad
        except Exception as bad:  # a codec's own fault, of another package perhaps
            error = BadAnswer(f"the codec failed: {describe_fault(bad)}")
        if error is None and not reason and not self.is_closing:
            if decoder.data or (parts and not parts[-1][1].last):
                net.acknowledge(self._sock)  # an answer is not here whole
            if decoder.owed:
                # Between whole requests, like them.
                self._batch.append(decoder.take_owed())
                self._accepted += len(self._batch[-1])
                self._owed += len(self._batch[-1])
            if self.load:
                self._owner.has_room(self)
            elif was_busy:
                self._flush()  # before it may be another process's
                if not self.is_held:
                    self._owner.freed(self)
            self._flush()
            if self._writer is None:
                self._owed = 0
            elif self._owed > MAX_OWED:
                error = BadAnswer(f"the target takes none of {self._owed} bytes that it asked for")
        elif error is None and reason is PRIVATE and not self.load and not self.is_closing:
            # With others in flight it ends, and they go again elsewhere where that is safe.
            reason = ""
            if not decoder.data or self._take_unasked():
                self._owner.bound(self, parts[-1][0])
        for exchange, part in parts:
            exchange.asker.deliver(exchange, part)
        if error is not None:
            self._break(error)
        elif reason:
            self._break(None, reason)

    # Ends.

    def _drop_all(self) -> list[Exchange]:
        """Take all that is in flight off the connection, in the order of sending."""
        rest = self._dismiss()
        for exchange in rest:
            self._owner.answered(exchange)
        self._batch.clear()
        self.load = 0
        return rest

    def fail(self, error: ExchangeError) -> None:
        rest = self._drop_all()
        self.close(str(error))
        for exchange in rest:
            exchange.asker.fail(exchange, error)

    def _end(self, reason: str, is_broken: bool) -> None:
        if not self.load:
            self._leave(reason, is_broken)
            return
        error: ExchangeError | None = None
        parts: list[tuple[Exchange, Part]] = []
        try:
            if is_broken:
                raise BadAnswer("the target broke off the connection")
            self._decoder.receive_eof()
            self._collect(parts)
        except BadAnswer as bad:
            error = UpstreamClosed(f"{bad} ({reason})")
            self._cut_off(str(error))
        rest = self._drop_all()
        self._leave(reason, is_broken)
        for exchange, part in parts:
            exchange.asker.deliver(exchange, part)
        if error is not None and rest and self._may_go_again_first(rest[0]):
            rest[0].retries += 1
            error = None
        self._settle(rest, error)

    def _break(self, error: ExchangeError | None, reason: str = "") -> None:
        """Close the connection; the first in flight fails with `error`, if there is one, and the rest is settled."""
        rest = self._drop_all()
        self.close(reason or str(error))
        self._settle(rest, error)

    def _settle(self, rest: list[Exchange], error: ExchangeError | None) -> None:
        """End what was in flight when the connection did: the first by `error`, the others by what is safe."""
        lost: list[Exchange] = []
        again: list[Exchange] = []
        for exchange in rest[1:] if error is not None else rest:
            (again if self._may_go_again(exchange) else lost).append(exchange)
        for exchange in again:
            exchange.repeats += 1
        self._owner.repeat(again)
        if error is not None and rest:
            rest[0].asker.fail(rest[0], error)
        for exchange in lost:
            exchange.asker.fail(exchange, UpstreamClosed("the target closed the connection before this answer"))

    def _may_go_again_first(self, exchange: Exchange) -> bool:
        """Whether the request whose answer was due may be sent once more; it may be what made the target close."""
        if not self._is_out(exchange):
            return True
        is_untouched = not exchange.answered and not self._decoder.has_surplus and exchange.body is None
        return exchange.request.repeatable and self.used > 1 and not exchange.retries and is_untouched

    def _may_go_again(self, exchange: Exchange) -> bool:
        if not self._is_out(exchange):
            return True
        return exchange.request.repeatable and exchange.repeats < MAX_REPEATS

    def _is_out(self, exchange: Exchange) -> bool:
        """Whether a byte of the request may have reached the target."""
        return exchange.begin < self._written
