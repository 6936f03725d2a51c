"""Strict multiplexing: an upstream connection with one request in flight. The shortest way, for all protocols."""

from __future__ import annotations

import socket

from gmux import net
from gmux.codecs.base import AnswerDecoder, Part, PrivatePart, Unsolicited
from gmux.errors import BadAnswer, ExchangeError, UpstreamClosed, describe_fault
from gmux.exchange import Exchange
from gmux.upstream import Owner, Traits, Upstream


class StrictUpstream(Upstream):
    """`exchange` is the one in flight."""

    __slots__ = ("exchange",)

    def __init__(self, owner: Owner, sock: socket.socket, decoder: AnswerDecoder, traits: Traits) -> None:
        super().__init__(owner, sock, decoder, traits)
        self.exchange: Exchange | None = None

    def send(self, exchange: Exchange) -> None:
        request = exchange.request
        data = request.data
        self.exchange = exchange
        self._decoder.request = request
        if self.verbose:
            self._owner.saw(self, exchange, data, False)
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # Not one byte was taken, so any request may go on another connection.
            self.exchange = None
            self._close_now(f"sending failed: {error.strerror}")
            self._owner.repeat((exchange,))
            return
        self.used += 1
        self._owner.sent(self)
        self._kick()
        if sent != len(data) or exchange.body is not None:
            self._write_on(memoryview(data)[sent:])

    def fail(self, error: ExchangeError) -> None:
        exchange, self.exchange = self.exchange, None
        self.close(str(error))
        if exchange is not None:
            exchange.asker.fail(exchange, error)

    def discard(self, exchange: Exchange, error: ExchangeError) -> None:
        if exchange is self.exchange:
            self.fail(error)

    def _take(self) -> None:
        exchange = self.exchange
        decoder = self._decoder
        if exchange is None:
            self._take_unasked()
            return
        try:
            self._pass_on(exchange, decoder)
        except BadAnswer as error:
            self.fail(error)
        except Exception as error:  # a codec's own fault, of another package perhaps
            self.fail(BadAnswer(f"the codec failed: {describe_fault(error)}"))

    def _pass_on(self, exchange: Exchange, decoder: AnswerDecoder) -> None:
        """Hand every part of the answer that is there to the asker. Raises BadAnswer."""
        part = decoder.next_event()
        while part is not None:
            if not part.last and isinstance(part, Unsolicited):
                if reason := self._owner.unsolicited(self, part):
                    raise BadAnswer(reason)
            else:
                if self.verbose:
                    self._owner.saw(self, exchange, part.data, True)
                exchange.answered = True
                if part.last:
                    self._complete(exchange, part)
                    return
                if part.data:
                    self._owner.sent(self)
                exchange.asker.deliver(exchange, part)
            if decoder.data and not self.is_closing and self._scheduler.is_step_over():
                self._put_off()
                break
            part = decoder.next_event()
        if not self.is_closing:
            net.acknowledge(self._sock)  # the answer is not here whole
            if decoder.owed and self._writer is None:
                self._pay(decoder.take_owed())

    def _complete(self, exchange: Exchange, part: Part) -> None:
        """The answer is whole: free the connection, or end it, and deliver the last part."""
        decoder = self._decoder
        self.exchange = None
        if self.is_closing:
            pass
        elif self._writer is not None:
            self.close("the target answered before it had the whole request")
        elif not part.reusable:
            self._bind_or_close(exchange, part)
        elif not (decoder.data or decoder.owed) or self._take_unasked():
            # The next request goes out before this answer is delivered: the time from an answer to the next
            # request is all that a strict connection idles, so nothing that can wait is done in it.
            self.idle_limit = part.idle_limit
            self._owner.freed(self)
        exchange.asker.deliver(exchange, part)

    def _bind_or_close(self, exchange: Exchange, part: Part) -> None:
        """The answer is whole, and the connection is not for all any more."""
        if not isinstance(part, PrivatePart):
            self.close("the target's answer ends the connection")
        elif not (self._decoder.data or self._decoder.owed) or self._take_unasked():
            self.idle_limit = part.idle_limit
            self._owner.bound(self, exchange)

    def _end(self, reason: str, is_broken: bool) -> None:
        exchange = self.exchange
        if exchange is None:
            self._leave(reason, is_broken)
            return
        try:
            if is_broken:
                raise BadAnswer("the target broke off the connection")
            self._decoder.receive_eof()
            # Some answers end with the connection. The next request needs another one: nothing is handed over here.
            self._see_end(reason)
            self._pass_on(exchange, self._decoder)
        except BadAnswer as error:
            may_repeat = (
                exchange.request.repeatable
                and self.used > 1
                and not exchange.retries
                and not exchange.answered
                and not self._decoder.has_surplus
                and exchange.body is None
            )
            self.exchange = None
            self._leave(reason, is_broken)
            if may_repeat:
                exchange.retries += 1
                self._owner.repeat((exchange,))
            else:
                exchange.asker.fail(exchange, UpstreamClosed(f"{error} ({reason})"))

    def _next_data(self) -> bytes:
        body = self.exchange.body if self.exchange is not None else None
        return body.read() if body is not None else b""
