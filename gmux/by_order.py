"""Several requests in flight on one upstream connection, answered in their order.

When the connection ends early, the answers that are missing are those of the last requests. Those that may be repeated
go again on another connection, in their order, and no other does. When an answer is late, the connection ends, because
a late answer would be taken for the next one.

By order, an answer that the target leaves out makes all later ones the answers to other requests. So requests are put
behind one another only with the licence of the pool, and each sign of a lost one is a doubt that takes it away.
"""

from __future__ import annotations

import socket
from collections import deque
from time import monotonic

from gmux.codecs.base import AnswerDecoder, Part, PrivatePart, Unsolicited
from gmux.errors import AnswerTimeout, BadAnswer, ExchangeError
from gmux.exchange import Exchange
from gmux.pipelined import PRIVATE, PipelinedUpstream, PipelineOwner
from gmux.upstream import Traits

OUT_OF_TURN = "an answer came that is not that of the first request in flight"

#: Seconds after the last answer within which unsolicited bytes may be a second answer to a request. Later they are more
#: likely the target's farewell to an idle connection, such as a 408 of HTTP.
SURPLUS_TIME = 1.0


class OrderedUpstream(PipelinedUpstream):
    __slots__ = ("_emptied", "_first", "_in_flight", "_is_shared")

    def __init__(self, owner: PipelineOwner, sock: socket.socket, decoder: AnswerDecoder, traits: Traits) -> None:
        super().__init__(owner, sock, decoder, traits)
        self._in_flight: deque[Exchange] = deque()
        # Since nothing was in flight: what was sent first, and whether anything was put behind it.
        self._first: Exchange | None = None
        self._is_shared = False
        # When nothing was in flight any more.
        self._emptied = 0.0

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
            and self._owner.licence.is_granted
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
        if exchange.answered:
            self._owner.asked(exchange)  # its answer has begun, and `sent` watches the rest
        elif self._in_flight[0].answered:
            # The target is at an answer before it, so nothing is lost. It keeps its place, so that its answer, which is
            # dropped, is not another's.
            exchange.is_abandoned = True
            exchange.asker.fail(exchange, error)
        else:
            self._give_all_up(exchange, error)

    def fail(self, error: ExchangeError) -> None:
        if isinstance(error, AnswerTimeout) and self._in_flight:
            self._give_all_up(self._in_flight[0], error)
        else:
            super().fail(error)

    def _give_all_up(self, late: Exchange, error: ExchangeError) -> None:
        """Close the connection; `late` fails with `error`, and what else is in flight is settled."""
        self._doubt(str(error))
        rest = self._drop_all()
        rest.remove(late)
        self.close(str(error))
        self._settle(rest, None)
        late.asker.fail(late, error)

    # Signs of a lost request. One that was alone on the connection is not lost because of others.

    def _doubt(self, reason: str) -> None:
        if self._is_shared:
            self._owner.doubt(self, reason)

    def _break(self, error: ExchangeError | None, reason: str = "") -> None:
        if isinstance(error, BadAnswer):
            self._doubt(str(error))
        super()._break(error, reason)

    def _cut_off(self, reason: str) -> None:
        # Before it has answered any of them, it may have closed without having read them.
        if self._in_flight[0] is not self._first:
            self._doubt(reason)

    def _take_unasked(self) -> bool:
        is_sound = super()._take_unasked()
        if not is_sound and monotonic() - self._emptied < SURPLUS_TIME:
            self._doubt(self._close_reason)
        return is_sound

    def _wrote(self, size: int) -> None:
        super()._wrote(size)
        self._owner.sent(self)

    def _admit(self, exchange: Exchange) -> None:
        if self._in_flight:
            self._is_shared = True
        else:
            self._first = exchange
            self._is_shared = False
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
            if decoder.data and self._scheduler.is_step_over():
                self._put_off()
                break
            part = decoder.next_event()
            if part is None:
                break
            if isinstance(part, Unsolicited):
                if part.is_answer and self.load > 1:
                    # One is missing, or they come in another order.
                    raise BadAnswer(OUT_OF_TURN)
                if reason := self._owner.unsolicited(self, part):
                    return reason
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
            self.idle_limit = part.idle_limit
            if not part.reusable:
                return PRIVATE if isinstance(part, PrivatePart) else "the target's answer ends the connection"
            if not in_flight:
                self._emptied = monotonic()
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
