"""One upstream connection: its socket, the decoder of its answers, and the exchange in flight.

The pool creates it, connected, and is told when it may carry the next request (`freed`) and when it has ended
(`ended`). Everything here runs in callbacks of the loop and never switches greenlets.

    state       socket     exchange     left by
    idle        open       none         send -> busy; the target closes, or sends what nobody asked for -> closed
    busy        open       in flight    last part of the answer -> idle; doubt -> closing
    closing     half-open  none         the target closes too, or CLOSE_TIMEOUT -> closed
    closed      closed     none         -

Closing waits for the target's own end: a target that allows one connection counts the old one until it has read our
FIN, and must never see the new one first (invariant 1).
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Protocol

from gevent import get_hub

from gmux import net
from gmux.codecs.base import NO_LIMIT, AnswerDecoder
from gmux.errors import BadAnswer, ExchangeError, UpstreamClosed
from gmux.exchange import Exchange
from gmux.net import READ_SIZE

READ, WRITE = 1, 2

#: Seconds that a target has to close its side after ours. A device that hangs is cut off with a reset then.
CLOSE_TIMEOUT = 1.0


class Owner(Protocol):
    """What an upstream connection asks of its pool. No call may switch greenlets."""

    def sent(self, upstream: Upstream) -> None:
        """The clock of the answer starts, or starts anew: the target took a part of the request, or sent one back."""

    def freed(self, upstream: Upstream) -> None:
        """The exchange is over and the connection is certain."""

    def closing(self, upstream: Upstream, reason: str) -> None:
        """It takes no more requests, but still counts; the pool calls `abort` after CLOSE_TIMEOUT."""

    def ended(self, upstream: Upstream, reason: str) -> None:
        """The socket is closed."""

    def repeat(self, exchange: Exchange) -> None:
        """Send this exchange once more, before all that wait."""

    def saw(self, upstream: Upstream, exchange: Exchange, data: bytes, is_answer: bool) -> None:
        """A message passed; called only when `verbose` is set."""


class Upstream:
    """See the module. `verbose` asks for a call of `saw` for each message.

    `idle_limit` is for how many seconds after the last answer the target keeps the connection, as it said.
    """

    __slots__ = (
        "exchange",
        "name",
        "opened",
        "used",
        "idle_limit",
        "is_closing",
        "is_closed",
        "is_retired",
        "is_stale",
        "verbose",
        "_owner",
        "_sock",
        "_send",
        "_recv",
        "_decoder",
        "_kick",
        "_reader",
        "_writer",
        "_unsent",
        "_close_reason",
    )

    def __init__(
        self, owner: Owner, sock: socket.socket, decoder: AnswerDecoder, kick: Callable[[], None], verbose: bool
    ) -> None:
        self.exchange: Exchange | None = None
        self.name = f"{net.format_address(sock.getsockname())} <-> {net.format_address(sock.getpeername())}"
        self.opened = monotonic()
        self.used = 0
        self.idle_limit = NO_LIMIT
        self.is_closing = self.is_closed = self.is_retired = False
        self.verbose = verbose
        self._owner = owner
        self._sock = sock
        self._send = sock.send
        self._recv = sock.recv
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        # Whether the connection has ended, or holds bytes nobody asked for, that the loop has not seen yet. Asked
        # before each request: a poll costs a third of a peek, which would raise in the common case.
        self.is_stale = partial(poller.poll, 0)
        self._decoder = decoder
        self._kick = kick
        # When the process is killed the kernel closes for it. What it has not sent yet would go out first, while the
        # slot is free already: the target would see this connection and its successor.
        net.prepare_reset(sock)
        loop = get_hub().loop
        # Events of the target come before those of clients: its connection is what all wait for, and an end of it
        # must be seen before a request of the same turn of the loop is put on it.
        self._reader: Any = loop.io(sock.fileno(), READ, priority=loop.MAXPRI)
        self._writer: Any = None
        self._unsent: bytes | memoryview = b""
        self._close_reason = ""
        self._reader.start(self._on_readable)

    def send(self, exchange: Exchange) -> None:
        """Put the exchange's request on the idle connection."""
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
            self._owner.repeat(exchange)
            return
        self.used += 1
        self._owner.sent(self)
        self._kick()
        if sent != len(data) or exchange.body is not None:
            self._unsent = memoryview(data)[sent:]
            self._writer = get_hub().loop.io(self._sock.fileno(), WRITE)
            self._writer.start(self._on_writable)

    def close(self, reason: str) -> None:
        """End the connection in good order: say FIN, wait for the target's own."""
        if self.is_closing or self.is_closed:
            return
        self.is_closing = True
        self._close_reason = reason
        self._stop_writing()
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close_now(reason)
        else:
            self._owner.closing(self, reason)

    def retire(self, reason: str) -> None:
        """Close a sound connection that is not wanted any more: no sign of a target that is down."""
        self.is_retired = True
        self.close(reason)

    def abort(self) -> None:
        """End the connection at once, with a reset."""
        self._close_now(self._close_reason, is_abort=True)

    def fail(self, error: ExchangeError) -> None:
        """Fail the exchange in flight, if there is one, and close: a late answer dies with the connection."""
        exchange, self.exchange = self.exchange, None
        self.close(str(error))
        if exchange is not None:
            exchange.asker.fail(exchange, error)

    def _on_readable(self) -> None:
        try:
            data = self._recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._on_end(error.strerror or str(error), is_broken=True)
            return
        if not data:
            self._on_end("closed by the target")
            return
        if self.is_closing:
            return
        exchange = self.exchange
        decoder = self._decoder
        if decoder.data:
            decoder.receive_data(data)
        else:
            decoder.data = data
        if exchange is None:
            if decoder.has_surplus:
                self.close(f"{len(data)} bytes came that nobody asked for")
            return
        try:
            self._pass_on(exchange, decoder)
        except BadAnswer as error:
            self.fail(error)
        except Exception as error:  # a codec's own fault, of another package perhaps
            self.fail(BadAnswer(f"the codec failed: {error!r}"))

    def _pass_on(self, exchange: Exchange, decoder: AnswerDecoder) -> None:
        """Hand every part of the answer that is there to the asker. Raises BadAnswer."""
        part = decoder.next_event()
        while part is not None:
            if self.verbose:
                self._owner.saw(self, exchange, part.data, True)
            exchange.answered = True
            if part.last:
                self.exchange = None
                if self.is_closed:
                    pass
                elif self._writer is not None:
                    self.close("the target answered before it had the whole request")
                elif not part.reusable:
                    self.close("the target's answer ends the connection")
                elif decoder.data and decoder.has_surplus:
                    self.close("bytes came behind the answer that nobody asked for")
                else:
                    # The next request goes out before this answer is delivered: the time from an answer to the next
                    # request is all that a strict connection idles, so nothing that can wait is done in it.
                    self.idle_limit = part.idle_limit
                    self._owner.freed(self)
                exchange.asker.deliver(exchange, part)
                return
            self._owner.sent(self)
            exchange.asker.deliver(exchange, part)
            part = decoder.next_event()

    def _on_end(self, reason: str, is_broken: bool = False) -> None:
        """The target sends no more. Only a FIN can end an answer; broken off, there may have been more to it."""
        exchange = self.exchange
        if exchange is None:
            self._close_now(self._close_reason or reason)
            return
        try:
            if is_broken:
                raise BadAnswer("the target broke off the connection")
            self._decoder.receive_eof()
            # Some answers end with the connection. The next request needs another one: nothing is handed over here.
            self._close_now(reason)
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
            self._close_now(reason)
            if may_repeat:
                exchange.retries += 1
                self._owner.repeat(exchange)
            else:
                exchange.asker.fail(exchange, UpstreamClosed(f"{error} ({reason})"))

    def _on_writable(self) -> None:
        exchange = self.exchange
        body = exchange.body if exchange is not None else None
        data = self._unsent
        if not data and body is not None:
            data = body.read()
        try:
            sent = self._send(data) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            # The target may have answered before it closed: what it sent is read first, and its end seen there.
            # The writer stays, stopped, as the sign of a request that is not out.
            self._writer.stop()
            return
        if sent:
            self._owner.sent(self)  # a target that takes a long request is not silent
        self._unsent = memoryview(data)[sent:]
        if not self._unsent and not body:
            self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writer is not None:
            self._writer.stop()
            self._writer.close()
            self._writer = None

    def _close_now(self, reason: str, is_abort: bool = False) -> None:
        if self.is_closed:
            return
        self.is_closing = self.is_closed = True
        # Watchers go before the descriptor: its number may be given to the next connection at once.
        self._reader.stop()
        self._reader.close()
        self._stop_writing()
        if not is_abort:
            net.prepare_close(self._sock)
        self._sock.close()
        self._owner.ended(self, reason)
