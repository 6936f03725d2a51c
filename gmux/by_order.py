"""Several requests in flight on one upstream connection, answered in their order.

When the connection ends early, the answers that are missing are those of the last requests. Those that may be repeated
go again on another connection, in their order, and no other does. When the target is silent, all that is in flight
ends, because a late answer would be taken for the next one.
"""

from __future__ import annotations

import socket
from collections import deque

from gmux.codecs.base import AnswerDecoder, Part, Unsolicited
from gmux.errors import BadAnswer, ExchangeError
from gmux.exchange import Exchange
from gmux.pipelined import PipelinedUpstream, PipelineOwner
from gmux.upstream import Traits

OUT_OF_TURN = "an answer came that is not that of the first request in flight"


class OrderedUpstream(PipelinedUpstream):
    __slots__ = ("_in_flight",)

    def __init__(self, owner: PipelineOwner, sock: socket.socket, decoder: AnswerDecoder, traits: Traits) -> None:
        super().__init__(owner, sock, decoder, traits)
        self._in_flight: deque[Exchange] = deque()

    def fits(self, exchange: Exchange) -> bool:
        in_flight = self._in_flight
        if not in_flight:
            return not self.is_closing
        return (
            exchange.request.pipelines
            and in_flight[-1].request.pipelines
            # An answer that comes in parts may have no end for long, nor one that nobody waits for any more.
            and not (in_flight[0].answered or in_flight[0].is_abandoned)
            and self.load < self._depth
            and not self.is_closing
            and not self.is_aged
            and self._decoder.may_pipeline
        )

    def discard(self, exchange: Exchange, error: ExchangeError) -> None:
        in_flight = self._in_flight
        # Behind an answer without end nobody else gets one; but to close the connection must not cost them theirs.
        if exchange not in in_flight:
            return
        if in_flight[0] is exchange and all(map(self._may_go_again, list(in_flight)[1:])):
            self._break(error)
        else:
            self._owner.abandon(exchange)  # again later

    def give_up(self, exchange: Exchange, error: ExchangeError) -> None:
        # The exchange keeps its place, so that its answer is not another's.
        if exchange.answered:
            self._owner.asked(exchange)  # its answer has begun, and `sent` watches the rest
        else:
            exchange.is_abandoned = True
            exchange.asker.fail(exchange, error)

    def _wrote(self, size: int) -> None:
        super()._wrote(size)
        self._owner.sent(self)

    def _admit(self, exchange: Exchange) -> None:
        if not self._in_flight:
            self._decoder.request = exchange.request
            self._owner.sent(self)
        self._in_flight.append(exchange)

    def _collect(self, parts: list[tuple[Exchange, Part]]) -> str:
        decoder = self._decoder
        in_flight = self._in_flight
        if not in_flight:
            self._take_unasked()
            return ""
        exchange = in_flight[0]
        while True:
            part = decoder.next_event()
            if part is None:
                break
            if isinstance(part, Unsolicited):
                # With others in flight an answer that is not the first one's says that one is missing, or out of turn.
                is_out_of_turn = part.is_answer and self.load > 1
                reason = OUT_OF_TURN if is_out_of_turn else self._owner.unsolicited(self, part)
                if reason:
                    raise BadAnswer(reason)
                continue
            if self.verbose:
                self._owner.saw(self, exchange, part.data, True)
            if exchange.end > self._written and not self._is_out(exchange):
                raise BadAnswer("the target answered before it was asked")
            exchange.answered = True
            parts.append((exchange, part))
            if not part.last:
                continue
            in_flight.popleft()
            self.load -= 1
            self._owner.answered(exchange)
            if exchange.end > self._written:
                return "the target answered before it had the whole request"
            if not part.reusable:
                return "the target's answer ends the connection"
            self.idle_limit = part.idle_limit
            if not in_flight:
                if decoder.data:
                    self._take_unasked()
                return ""
            exchange = in_flight[0]
            decoder.request = exchange.request
        if parts and parts[-1][1].data:
            self._owner.sent(self)  # the target is not silent
        return ""

    def _dismiss(self) -> list[Exchange]:
        rest = list(self._in_flight)
        self._in_flight.clear()
        return rest
