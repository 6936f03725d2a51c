"""One upstream connection: its socket, its life, and the writing of requests. What it carries is its subclasses' job.

The pool creates it, connected, and is told when it may carry more requests (`freed`) and when it has ended (`ended`).
Everything here runs in callbacks of the loop and never switches greenlets.

    state       socket     exchanges    left by
    idle        open       none         send -> busy; the target closes, or sends what nobody asked for -> closed
    busy        open       in flight    last part of the last answer -> idle; doubt -> closing
    closing     half-open  none         both sides have the other's FIN, or CLOSE_TIMEOUT -> closed
    closed      closed     none         -

A target that allows one connection counts the old one until it has our FIN, and must never see the new one first
(invariant 1). So a connection is over when each side has the other's FIN, whichever came first: a target that says its
own may go on reading, with our FIN behind all that it has not read.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, Protocol

from gevent import get_hub

from gmux import net
from gmux.codecs.base import NO_LIMIT, AnswerDecoder, Part
from gmux.errors import BadAnswer, ExchangeError, describe_fault
from gmux.exchange import Exchange
from gmux.net import READ_SIZE, RESET_PATIENCE
from gmux.scheduler import READ, WRITE, Share, Watch

#: Seconds that a closing takes at most. A device that hangs is cut off with a reset then.
CLOSE_TIMEOUT = 1.0

#: Seconds between two looks at whether a target that has said its end has ours: no event tells. It takes a round trip.
OVER_INTERVAL = 0.002

#: Seconds before a target's own end of an idle connection at which gmux ends it; half the time where that is less. A
#: request that is on its way while the target closes would be lost.
IDLE_MARGIN = 1.0

#: Seconds for which a connection that is wanted may bring messages that nobody asked for, one after the other.
ENDLESS_TIME = 1.0


def safe_idle_time(limit: float) -> float:
    """Seconds for which a connection may be idle that the target keeps for `limit`."""
    return limit - min(IDLE_MARGIN, limit / 2)


def _is_stale() -> bool:
    return True


class Owner(Protocol):
    """What an upstream connection asks of its pool. No call may switch greenlets."""

    def sent(self, upstream: Upstream) -> None:
        """The clock of the answer starts, or starts anew: the target took a part of the request, or sent one back."""

    def freed(self, upstream: Upstream) -> None:
        """No exchange is in flight any more, and the connection is certain."""

    def bound(self, upstream: Upstream, exchange: Exchange) -> None:
        """In place of `freed`: the connection is the own of who asked for this exchange, and it takes no one else's."""

    def closing(self, upstream: Upstream, reason: str) -> None:
        """It takes no more requests, but still counts; the pool calls `abort` after CLOSE_TIMEOUT."""

    def ended(self, upstream: Upstream, reason: str) -> None:
        """The socket is closed."""

    def repeat(self, exchanges: Iterable[Exchange]) -> None:
        """Send these exchanges once more, in this order, before all that wait."""

    def unsolicited(self, upstream: Upstream, part: Part) -> str:
        """A message came that nobody asked for. Returns why the connection must close; empty: it was dealt with."""

    def saw(self, upstream: Upstream, exchange: Exchange, data: bytes, is_answer: bool) -> None:
        """A message passed; called only when `verbose` is set."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What the upstream connections of a pool have in common.

    share       where they do their work, in turns with others
    kick        called when an answer may come soon
    verbose     asks for a call of `saw` for each message
    hears       messages that nobody asked for are framed, and the pool decides on them; else any byte of one is doubt
    depth       exchanges in flight on one connection, at most
    late_window seconds for which the key of a request without answer is reserved; 0: as long as the connection is open
    """

    share: Share
    kick: Callable[[], None]
    verbose: bool = False
    hears: bool = False
    depth: int = 1
    late_window: float = 0.0


class Upstream:
    """See the module.

    `idle_limit` is for how many seconds after the last answer the target keeps the connection, as it said. `is_aged`:
    it is to be replaced, or lent, as soon as nothing is in flight. `greeting` is what was sent first, until it is
    answered. `is_fresh`: its pool has put no request on it while others asked for it.
    """

    __slots__ = (
        "name",
        "opened",
        "used",
        "is_fresh",
        "idle_limit",
        "is_closing",
        "is_closed",
        "is_retired",
        "is_aged",
        "is_stale",
        "verbose",
        "hears",
        "greeting",
        "_owner",
        "_sock",
        "_send",
        "_recv",
        "_decoder",
        "_kick",
        "_reader",
        "_scheduler",
        "_poll",
        "is_put_off",
        "_goes_on",
        "_wanted_since",
        "_writer",
        "_unsent",
        "_close_reason",
        "_over",
    )

    def __init__(self, owner: Owner, sock: socket.socket, decoder: AnswerDecoder, traits: Traits) -> None:
        self.name = net.format_ends(sock, sock.getsockname(), sock.getpeername())
        self.opened = monotonic()
        self.used = 0
        self.is_fresh = True
        self.idle_limit = NO_LIMIT
        self.is_closing = self.is_closed = self.is_retired = self.is_aged = False
        self.verbose = traits.verbose
        self.hears = traits.hears
        self.greeting: Exchange | None = None
        self._owner = owner
        self._sock = sock
        self._send = sock.send
        self._recv = sock.recv
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        # Whether the connection has ended, or holds bytes nobody asked for, that the loop has not seen yet. Asked
        # before each request: a poll costs a third of a peek, which would raise in the common case.
        self._poll = partial(poller.poll, 0)
        self.is_stale: Callable[[], object] = self._poll
        self._decoder = decoder
        self._kick = traits.kick
        # When the process is killed the kernel closes for it. What it has not sent yet would go out first, while the
        # slot is free already: the target would see this connection and its successor. (Of a Unix socket it holds
        # nothing back: all that it took is with the target.)
        net.prepare_reset(sock)
        self._scheduler = traits.share.scheduler
        self._reader = Watch(traits.share, sock.fileno(), READ, self._on_readable, is_target=True)
        # Whether the decoder holds more than was dealt with in this turn, and `_go_on` is to be called.
        self.is_put_off = self._goes_on = False
        # Since when the pool waits until nothing is left to be read; 0: it does not.
        self._wanted_since = 0.0
        self._writer: Watch | None = None
        self._unsent: bytes | memoryview = b""
        self._close_reason = ""
        # Runs while the target has said its end and has not got ours.
        self._over: Any = None
        self._reader.start()

    # What subclasses define.

    def send(self, exchange: Exchange) -> None:
        """Put the exchange's request on the connection."""
        raise NotImplementedError

    def fail(self, error: ExchangeError) -> None:
        """End all that is in flight, and close: a late answer dies with the connection."""
        raise NotImplementedError

    def discard(self, exchange: Exchange, error: ExchangeError) -> None:
        """Nobody waits for the answer to this exchange, and it goes on."""
        raise NotImplementedError

    def _take(self) -> None:
        """The decoder has new bytes; the connection is neither closing nor closed."""
        raise NotImplementedError

    def _end(self, reason: str, is_broken: bool) -> None:
        """The target sends no more. Only a FIN can end an answer; broken off, there may have been more to it."""
        raise NotImplementedError

    def _next_data(self) -> bytes | memoryview:
        """What is to be written next, when all before is out; empty: nothing."""
        raise NotImplementedError

    # The life of the connection.

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

    def _see_end(self, reason: str) -> None:
        """The target has said its end: the connection is over as soon as it has ours."""
        self.close(reason)
        if self.is_closed:
            return
        if net.is_over(self._sock):
            self._close_now(self._close_reason)
        elif self._over is None:
            self._reader.stop()  # the end of a stream stays readable
            self._over = get_hub().loop.timer(OVER_INTERVAL, OVER_INTERVAL)
            self._over.start(self._look_whether_over)

    def _look_whether_over(self) -> None:
        if net.is_over(self._sock):
            self._close_now(self._close_reason)

    def retire(self, reason: str) -> None:
        """Close a sound connection that is not wanted any more: no sign of a target that is down."""
        self.is_retired = True
        self.close(reason)

    def abort(self) -> None:
        """End the connection at once, with a reset."""
        self._close_now(self._close_reason, is_abort=True)

    @property
    def sock(self) -> socket.socket:
        return self._sock

    @property
    def is_clean(self) -> bool:
        """Whether nothing of the past can come, so that an idle connection may go on in other hands."""
        return (
            self.greeting is None
            and self.idle_limit == NO_LIMIT
            and self._decoder.is_replaceable
            and self._writer is None
        )

    def let_go(self) -> None:
        """The connection goes on in other hands, by a descriptor of their own; to the target nothing happens."""
        self.is_closing = self.is_closed = True
        self._reader.close()
        self._sock.close()

    def _on_readable(self) -> None:
        try:
            data = self._recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._on_end(error.strerror or str(error), True)
            return
        if not data:
            self._on_end("closed by the target", False)
        elif not self.is_closing:
            decoder = self._decoder
            if decoder.data:
                decoder.receive_data(data)
            else:
                decoder.data = data
            self._take()

    def _put_off(self) -> None:
        """Go on with what the decoder holds in the next turn of the loop, after others had their share of this one."""
        self.is_put_off = True
        self.is_stale = _is_stale
        self._reader.stop()
        self._go_on_later()

    def _go_on_later(self) -> None:
        if not self._goes_on:
            self._goes_on = True
            self.later(self._go_on)

    def later(self, step: Callable[[], None]) -> None:
        """Call `step` in the next turn of the loop, in the share of the route."""
        self._reader.later(step)

    def _go_on(self) -> None:
        self._goes_on = False
        if self.is_closed:
            return
        if self.is_put_off:
            self.is_put_off = False
            self.is_stale = self._poll
            if self._over is None:
                self._reader.start()
            if not self.is_closing:
                self._take()
        if not self._wanted_since or self.is_put_off or self.is_closing:
            return
        if not self.is_stale():
            self._wanted_since = 0.0
            self._owner.freed(self)
        elif monotonic() - self._wanted_since > ENDLESS_TIME:
            self.close("the target does not stop sending what nobody asked for")
        else:
            self._go_on_later()  # the loop reads it meanwhile

    def catch_up(self) -> bool:
        """Read what has come to an idle connection and the loop has not seen; whether it may be used now.

        If not, it has ended, and its owner knows; or more comes than fits in a slice, and `freed` is called later.
        """
        if not self.is_put_off:
            self._on_readable()
        if self.is_closing:
            return False
        if not self.is_put_off and not self.is_stale():
            return True
        self._wanted_since = monotonic()
        self._go_on_later()
        return False

    def _take_unasked(self) -> bool:
        """Deal with what the decoder holds while nothing is in flight; whether the connection is sound still.

        What does not fit in a slice is put off, and the connection counts as stale until then.
        """
        decoder = self._decoder
        if decoder.has_surplus:
            if not self.hears:
                self.close(f"{len(decoder.data)} bytes came that nobody asked for")
                return False
            try:
                while (part := decoder.next_event()) is not None:
                    if reason := self._owner.unsolicited(self, part):
                        self.close(reason)
                        return False
                    if decoder.data and self._scheduler.is_step_over():
                        self._put_off()
                        break
            except BadAnswer as error:
                self.close(str(error))
                return False
            except Exception as error:  # a codec's own fault, of another package perhaps
                self.close(f"the codec failed: {describe_fault(error)}")
                return False
            if decoder.has_surplus and not self.is_put_off:
                # Its rest would be taken for the beginning of the next answer.
                self.close("half a message came that nobody asked for")
                return False
        if decoder.owed:
            self._pay(decoder.take_owed())
        return not self.is_closing

    def _pay(self, owed: bytes) -> None:
        """Write what the target is owed, where no request is being written."""
        try:
            sent = self._send(owed)
        except OSError:
            sent = 0
        if sent != len(owed):
            self.close("the target takes nothing")

    def _on_end(self, reason: str, is_broken: bool) -> None:
        if not self.is_closing:
            try:
                self._end(reason, is_broken)
            except Exception as error:  # a codec's own fault, of another package perhaps
                self.fail(BadAnswer(f"the codec failed: {describe_fault(error)}"))
                self._leave(reason, is_broken)
        elif is_broken:
            self._close_now(self._close_reason)
        else:
            self._see_end(reason)

    def _leave(self, reason: str, is_broken: bool) -> None:
        """The target has ended the connection, with a FIN or a reset."""
        if is_broken:
            self._close_now(reason)
        else:
            self._see_end(reason)

    def _close_now(self, reason: str, is_abort: bool = False) -> None:
        if self.is_closed:
            return
        self.is_closing = self.is_closed = True
        self._reader.close()
        if self._over is not None:
            self._over.stop()
            self._over.close()
        self._stop_writing()
        if not is_abort:
            net.prepare_close(self._sock)
        self._sock.close()
        if is_abort:
            get_hub().loop.timer(RESET_PATIENCE).start(self._owner.ended, self, reason)
        else:
            self._owner.ended(self, reason)

    # Writing what the socket does not take at once.

    def _write_on(self, unsent: bytes | memoryview) -> None:
        """Go on with `unsent`, and with `_next_data`, when the socket takes more."""
        self._unsent = unsent
        self._writer = Watch(self._reader.share, self._sock.fileno(), WRITE, self._on_writable, is_target=True)
        self._writer.start()

    def _on_writable(self) -> None:
        data = self._unsent or self._next_data()
        try:
            sent = self._send(data) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            # The target may have answered before it closed: what it sent is read first, and its end seen there.
            # The writer stays, stopped, as the sign of a request that is not out.
            if self._writer is not None:
                self._writer.stop()
            return
        if sent:
            self._wrote(sent)
        self._unsent = memoryview(data)[sent:]
        if not self._unsent:
            self._unsent = self._next_data()
            if not self._unsent:
                self._stop_writing()

    def _wrote(self, size: int) -> None:
        """The socket took so many bytes more. A target that takes a long request is not silent."""
        self._owner.sent(self)

    def _stop_writing(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
