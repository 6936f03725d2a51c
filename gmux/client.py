"""One client: its socket, the decoder of its requests, one exchange at a time, and what it has not taken yet.

A greenlet for each client waits for bytes and frames requests; the answers are written from the callback of the
upstream connection that read them. A client has one exchange under way; what it sends behind it stays bytes until
the answer is out, so a client that pipelines gets one turn like any other (invariant 7) and costs its read buffer.

    state       reads                      left by
    open        and frames requests        end of input -> draining; a fatal refusal, `Connection: close` -> finishing
    half        no more                    the last answer is out -> closed
    finishing   and drops, LINGER_TIMEOUT  the client's own end -> closed
    closed      -                          -

The greenlet never waits anywhere but in `_wait`; to slow a client down its watcher is stopped, which needs no lock
and no event.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import gevent
from gevent import get_hub

from gmux import net
from gmux.broadcast import Broadcast
from gmux.codecs.base import Codec, Interim, Part, Request, RequestDecoder
from gmux.deadlines import Deadlines
from gmux.disk import Disk, Full
from gmux.ends import Ends
from gmux.errors import AnswerTooLarge, ExchangeError, FramingError, Overloaded, RequestTimeout, describe_fault
from gmux.exchange import Exchange
from gmux.mailbox import Sent
from gmux.memory import SMALL, Memory
from gmux.net import READ_SIZE
from gmux.pool import Pool
from gmux.ratelimit import LimitedWarnings
from gmux.scheduler import READ, WRITE, Share, Watch
from gmux.spool import Spool

#: Seconds that a client whose connection gmux ends has to take the last answer and close, before it is cut off.
#: A close with bytes unread would reset the connection and destroy the answer on its way (RFC 9112 section 9.6).
LINGER_TIMEOUT = 2.0

#: Bytes behind the request under way that are held for a client; then it is not read until the answer is out.
MAX_AHEAD = net.READ_SIZE


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Times in seconds, sizes in bytes; a time of 0 turns a limit off."""

    request_timeout: float = 30.0
    idle_timeout: float = 0.0
    write_timeout: float = 60.0
    spool_memory: int = 256 * 1024
    spool_limit: int = 1024 * 1024 * 1024


class Clients:
    """What the clients of one route share: settings, pool, clocks, the memory they may hold, and the list of them."""

    def __init__(
        self,
        settings: ClientSettings,
        codec: Codec,
        pool: Pool,
        memory: Memory,
        disk: Disk,
        ends: Ends,
        share: Share,
        log: logging.Logger,
    ) -> None:
        self.settings = settings
        self.codec = codec
        self.pool = pool
        self.memory = memory
        self.disk = disk
        self.ends = ends
        self.share = share
        self.log = log
        self.warn = LimitedWarnings(log)
        self.members: set[Client] = set()
        #: Gives a message of the target's own to every client; one that is slow delays no other.
        self.broadcast = Broadcast(share, lambda: self.members, self.warn).add
        #: Called by the listener with these clients, the socket, the name and the host.
        self.make_client: Callable[[Clients, socket.socket, str, str], Client] = Client
        self.is_draining = False
        #: Gives an idle client to another process; GONE where there is none.
        self.hand_over: Callable[[socket.socket], Sent] = lambda sock: Sent.GONE
        # Whether every client has more to do when its answer is out than to wait for its next request.
        self.is_always_due = bool(settings.idle_timeout)
        self.requesting: Deadlines[Client] = Deadlines(settings.request_timeout, Client.request_timed_out)
        self.idling: Deadlines[Client] = Deadlines(settings.idle_timeout, Client.idle_timed_out)
        self.writing: Deadlines[Client] = Deadlines(settings.write_timeout, Client.write_timed_out)
        #: Those whose connection gmux is ending; they take no place.
        self.lingering: Deadlines[Client] = Deadlines(LINGER_TIMEOUT, Client.linger_timed_out)

    def spool(self) -> Spool:
        return Spool(self.memory, self.disk, self.settings.spool_memory, self.settings.spool_limit)

    def end_lingering(self) -> bool:
        """Close the client that has been told to go for the longest time, for one that comes; false: there is none."""
        if not self.lingering:
            return False
        client = self.lingering.pop_first()
        self.log.debug("%s: closed before its own end: another client comes", client.name)
        client._close()
        return True

    def drain(self, has_successor: bool) -> None:
        """Let clients go: those that have no request under way at once, the others after their answer."""
        self.is_draining = self.is_always_due = True
        for client in list(self.members):
            client.drain(has_successor)

    def leave(self) -> bool:
        """Let those go that could not be handed over before; whether that was so with the last one, too."""
        return any(client.is_idle and not client.leave() for client in list(self.members))


class Client:
    """See the module. Made and run by the listener's greenlet, which closes the socket when `serve` returns."""

    __slots__ = (
        "name",
        "_shared",
        "_sock",
        "_send",
        "_recv",
        "_decoder",
        "_exchange",
        "_incoming",
        "_is_open",
        "_is_half",
        "_is_closed",
        "_is_due",
        "_is_deferred",
        "_is_advancing",
        "_is_reading",
        "_is_timed",
        "_ahead",
        "_held",
        "_unacknowledged",
        "_outbox",
        "_reader",
        "_writer",
        "_greenlet",
        "is_handed_over",
    )

    def __init__(self, shared: Clients, sock: socket.socket, name: str, host: str) -> None:
        """`name` is for the log, `host` the address without the port, or empty where there is none."""
        self.name = name
        self._shared = shared
        self._sock = sock
        self._send = sock.send
        self._recv = sock.recv
        self._decoder: RequestDecoder = shared.codec.request_decoder(host)
        self._exchange: Exchange | None = None
        self._incoming: Exchange | None = None
        self._is_open = True
        self.is_handed_over = False
        # Whether there is more to do when the answer is out than to wait: bytes are held, an end was seen, the clock
        # of idle clients is to be started. Without it each answer would pay for asking all of them.
        self._is_due = False
        self._is_half = self._is_closed = self._is_deferred = self._is_advancing = self._is_reading = self._is_timed = (
            False
        )
        self._ahead = self._held = self._unacknowledged = 0
        self._outbox: Spool | None = None
        self._reader = Watch(shared.share, sock.fileno(), READ, self._on_readable)
        self._writer: Watch | None = None
        self._greenlet: Any = None

    @property
    def _log(self) -> logging.Logger:
        return self._shared.log

    # The greenlet.

    def serve(self, refusal: ExchangeError | None = None) -> None:
        """Serve the client until it has ended, or only tell it why not; the body of its greenlet.

        This is the only place where the greenlet switches.
        """
        shared = self._shared
        self._greenlet = gevent.getcurrent()
        self._reader.step = self._greenlet.switch
        shared.members.add(self)
        wait = get_hub().switch
        try:
            if refusal is not None:
                self._turn_away(refusal)
            else:
                self._start_idling()
                self._read_on()
                if shared.is_draining:
                    self.drain(False)
            while not self._is_closed:
                wait()
                if self._is_reading:
                    self._on_readable()
        finally:
            # Also when the greenlet is killed.
            self._close()
            shared.members.discard(self)
            self._greenlet = None

    def _on_readable(self) -> None:
        size = READ_SIZE
        if self._shared.memory.is_scarce:
            if self._is_open and (self._exchange is not None or self._outbox is not None):
                self._is_due = True
                self._read_off()
                return
            size = SMALL
        try:
            data = self._recv(size)
        except BlockingIOError:
            return
        except OSError as error:
            self._vanish(error)
            return
        if not data:
            self._on_end()
        elif self._is_open:
            decoder = self._decoder
            if decoder.data:
                decoder.receive_data(data)
            else:
                decoder.data = data
            if self._exchange is None and self._outbox is None and not self._is_deferred:
                self._advance()
            else:
                self._is_due = True
                self._ahead += len(data)
                if self._ahead > MAX_AHEAD or not self._count():
                    self._read_off()

    def _on_end(self) -> None:
        """The client sends no more; it may still wait for answers."""
        self._is_half = self._is_due = True
        self._read_off()
        # What it has not taken yet it may still be reading.
        is_free = self._exchange is None and not self._is_deferred
        if self._outbox is None and (is_free or not self._is_open):
            self._close()

    def _read_on(self) -> None:
        if not self._is_reading and not self._is_half:
            self._is_reading = True
            self._shared.ends.unwatch(self._sock.fileno())
            self._reader.start()

    def _read_off(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._reader.stop()
            # It may be gone before it is read again, and its request with it.
            self._shared.ends.watch(self._sock.fileno(), self._end_unread)

    def _end_unread(self) -> None:
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.EPIPE
        self._vanish(OSError(number, os.strerror(number)))

    # Requests.

    @property
    def has_request(self) -> bool:
        """Whether a request is under way: not whole yet, waiting, or not answered to its end."""
        return self._is_timed or self._is_deferred or self._exchange is not None or self._outbox is not None

    def _advance(self) -> None:
        """Take the client's next request, if it is free for one."""
        if self._is_advancing or self._is_deferred:
            return  # a refusal came back at once: the loop below goes on
        self._is_advancing = True
        has_begun = False
        scheduler = self._reader.share.scheduler
        try:
            while self._exchange is None and self._outbox is None and self._is_open:
                if has_begun and scheduler.is_step_over():
                    self._is_deferred = True
                    self._reader.later(self._advance_on)
                    break
                has_begun = True
                event = self._decoder.next_event()
                if event is None:
                    self._await_more()
                    break
                if isinstance(event, Request):
                    if event.whole:
                        self._checkout(Exchange(self, event))
                    else:
                        self._incoming = Exchange(self, event, self._shared.spool())
                elif isinstance(event, Part):
                    self._continue(event)
                else:
                    self._write(self._decoder.take_owed())
        except FramingError as error:
            self._refuse_incoming(error)
        except Full as error:
            self._refuse_incoming(Overloaded(f"the request cannot be held: {error}"))
        except Exception:
            # A codec's own fault, of another package perhaps. It ends with this client: the caller may be the upstream
            # connection, which goes on for all.
            self._codec_failed()
        finally:
            self._is_advancing = False

    def _advance_on(self) -> None:
        self._is_deferred = False
        if not self._is_closed:
            self._advance()

    def _continue(self, part: Part) -> None:
        exchange = self._incoming
        assert exchange is not None and exchange.body is not None
        exchange.body.write(part.data)
        if part.last:
            self._incoming = None
            exchange.began = monotonic()
            self._checkout(exchange)

    def _checkout(self, exchange: Exchange) -> None:
        if self._is_timed:
            self._is_timed = False
            self._shared.requesting.discard(self)
        if self._decoder.owed:
            self._write(self._decoder.take_owed())
            if self._is_closed:
                exchange.close()
                return
        self._exchange = exchange
        data = self._decoder.data
        if (self._held or len(data) + len(exchange.request.data) > SMALL) and not self._count():
            self._exchange = None
            exchange.close()
            self._refuse(Overloaded(f"the request cannot be held: {self._shared.memory.full}"), exchange.request)
            return
        self._is_due = bool(data or self._held) or not self._is_reading or self._shared.is_always_due
        self._shared.pool.checkout(exchange)

    def _await_more(self) -> None:
        """No whole request is there: start the clock that fits, account for what is held, and read on."""
        shared = self._shared
        self._ahead = 0
        if self._decoder.owed:
            self._write(self._decoder.take_owed())
            if self._is_closed:
                return  # it was gone, and nothing of it may be held any more
        held = len(self._decoder)
        if held or self._incoming is not None:
            if self._is_half:
                self._log.debug("%s: ended in the middle of a request", self.name)
                self._close()
                return
            if not self._count():
                raise Full(self._shared.memory.full)
            if not self._is_timed:
                self._is_timed = True
                shared.requesting.add(self)
        else:
            self._give_back()
            if self._is_half:
                self._finish()
                return
            if shared.is_draining:
                self.leave()
                return
            self._start_idling()
        self._read_on()

    def _count(self) -> bool:
        """Count the bytes of its requests against the memory of all, when they are more than its allowance covers.

        False, and nothing counted, when there is no room.
        """
        self._give_back()
        size = len(self._decoder.data)
        for exchange in (self._exchange, self._incoming):
            if exchange is not None:
                size += len(exchange.request.data)
        if size > SMALL:
            if not self._shared.memory.take(size):
                return False
            self._held = size
        return True

    def _give_back(self) -> None:
        self._shared.memory.give(self._held)
        self._held = 0

    def _start_idling(self) -> None:
        if self._shared.settings.idle_timeout:
            self._shared.idling.add(self)

    # Answers: called by upstream connections and the pool; these never switch greenlets and never raise.

    def deliver(self, exchange: Exchange, part: Part) -> None:
        if exchange is not self._exchange:
            if part.last:
                self._shared.pool.forget(exchange)
            return  # the client is gone
        self._write(part.data)
        if part.last:
            if exchange.body is not None:
                exchange.body.close()
            if exchange is self._exchange:
                self._exchange = None
                if part.close:
                    self._finish()
                elif self._is_due:
                    self._advance()
            else:
                self._shared.pool.forget(exchange)
        elif not isinstance(part, Interim):
            exchange.told = True

    def fail(self, exchange: Exchange, error: ExchangeError) -> None:
        if exchange is not self._exchange:
            self._shared.pool.forget(exchange)
            return
        exchange.close()
        self._exchange = None
        if exchange.told:
            self._warn(error)
            # Only a reset tells the client that what it has is not the whole answer; on a Unix socket, its length.
            self.abort()
        else:
            self._refuse(error, exchange.request)

    def tell(self, message: bytes) -> None:
        """Give the client a message that it did not ask for."""
        if self._is_open:
            self._write(message)

    # Ends.

    def _codec_failed(self) -> None:
        self._log.error("%s: the codec failed: %s", self.name, describe_fault(sys.exception()))
        self.abort()

    def _refuse_incoming(self, error: ExchangeError) -> None:
        """Refuse what is not here whole."""
        request = self._incoming.request if self._incoming is not None else self._decoder.begun
        if request is not None:
            request.close = True
        self._refuse(error, request)

    def _turn_away(self, error: ExchangeError) -> None:
        """Refuse the client itself, in the form that its first request asks for, where that is here already."""
        with suppress(OSError):  # nothing yet; what is wrong with the socket is seen when the refusal is written
            self._decoder.data = self._recv(READ_SIZE)
        self._refuse(error, self._decoder.begun)

    def _refuse(self, error: ExchangeError, request: Request | None) -> None:
        self._warn(error)
        try:
            refusal = self._shared.codec.refuse(error, request)
        except Exception:  # it ends with this client: others may be behind it in the same list
            self._codec_failed()
            return
        if refusal.data:
            self._write(refusal.data)
        if refusal.close or request is None:
            # Without a whole request it is not known where the next one begins.
            self._finish()
        else:
            self._advance()

    def _warn(self, error: ExchangeError) -> None:
        self._shared.warn(error.cause, f"{self.name}: {error} ({error.cause})")

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it is under way here, so that it may be another process's."""
        return self._is_open and not self._is_half and not self.has_request and not self._decoder.data

    def leave(self) -> bool:
        """The process drains and nothing is under way: the client goes to another one, or its connection ends.

        False: it is to be tried again.
        """
        sent = self._shared.hand_over(self._sock)
        if sent is Sent.LATER:
            self._read_on()
            return False
        if sent is Sent.DONE:
            self.is_handed_over = True
            self._close()
        else:
            self._finish()
        return True

    def _finish(self) -> None:
        """End the connection once what is written is out."""
        if self._is_open:
            self._is_open = False
            self._drop_incoming()
            self._decoder.data = b""
            self._give_back()
            self._shared.pool.dismiss(self)
            if self._outbox is None:
                self._shut()

    def _shut(self) -> None:
        """Say FIN; close when the client has said its own, or when it has all and LINGER_TIMEOUT is over."""
        if self._is_closed:
            return
        if self._is_half:
            self._close()
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._vanish(error)
            return
        self._shared.lingering.add(self)
        self._read_on()

    def _vanish(self, error: OSError) -> None:
        self._log.debug("%s: %s", self.name, error.strerror)
        self._close()

    def abort(self) -> None:
        """End the connection at once, with a reset."""
        net.prepare_reset(self._sock)
        self._close()

    def _close(self) -> None:
        """Let go of everything; the greenlet ends, and the listener closes the socket. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._is_open = False
        # Watchers go before the descriptor: its number may be given to the next connection at once.
        self._is_reading = False
        self._reader.close()
        self._shared.ends.unwatch(self._sock.fileno())
        self._stop_writing()
        self._drop_incoming()
        shared = self._shared
        for clock in (shared.requesting, shared.idling, shared.writing, shared.lingering):
            clock.discard(self)
        if self._outbox is not None:
            self._outbox.close()
        self._give_back()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            shared.pool.abandon(exchange)
        shared.pool.dismiss(self)
        if gevent.getcurrent() is not self._greenlet:
            get_hub().loop.run_callback(self._greenlet.switch)

    def _drop_incoming(self) -> None:
        if self._incoming is not None:
            self._incoming.close()
            self._incoming = None

    def drain(self, has_successor: bool) -> None:
        """Leave as soon as no request is under way."""
        if has_successor:
            if self._exchange is not None:
                self._is_due = True
                self._read_off()  # what comes now is for the successor
        else:
            if self._is_reading:
                self._on_readable()  # what has come already is a request to be served
            if self._exchange is not None:
                self._exchange.request.close = self._is_due = True
        if self.is_idle:
            self.leave()

    def request_timed_out(self) -> None:
        self._is_timed = False
        if self._is_open:
            seconds = self._shared.settings.request_timeout
            limit = f"{seconds:g} s (--request-timeout)"
            self._refuse_incoming(RequestTimeout(f"the request was not complete within {limit}"))

    def idle_timed_out(self) -> None:
        if not self.has_request:
            self._log.debug("%s: idle", self.name)
            self._finish()

    def linger_timed_out(self) -> None:
        """The client has not closed. What is left in the kernel's buffer it may take as slowly as any answer."""
        left = net.unacknowledged(self._sock)
        if not left:
            self._close()
            return
        shared = self._shared
        if left != self._unacknowledged or self not in shared.writing:
            shared.writing.add(self)
        self._unacknowledged = left
        shared.lingering.add(self)

    def write_timed_out(self) -> None:
        seconds = self._shared.settings.write_timeout
        self._warn(AnswerTooLarge(f"the client took nothing of its answer for {seconds:g} s (--client-write-timeout)"))
        self.abort()

    # Writing.

    def _write(self, data: bytes) -> None:
        if not data or self._is_closed:
            return
        if self._outbox is None:
            try:
                sent = self._send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._vanish(error)
                return
            if sent == len(data):
                return
            self._is_due = True
            data = data[sent:]
            self._outbox = self._shared.spool()
            self._writer = Watch(self._shared.share, self._sock.fileno(), WRITE, self._on_writable)
            self._writer.start()
            self._shared.writing.add(self)
        try:
            self._outbox.write(data)
        except Full as error:
            self._warn(AnswerTooLarge(f"the client is too slow for its answer: {error}"))
            self.abort()

    def _on_writable(self) -> None:
        outbox = self._outbox
        assert outbox is not None
        data = outbox.peek()
        if data:
            try:
                sent = self._send(data)
            except BlockingIOError:
                return
            except OSError as error:
                self._vanish(error)
                return
            outbox.skip(sent)
            self._shared.writing.add(self)
        if not outbox:
            outbox.close()
            self._outbox = None
            self._stop_writing()
            if self._is_open:
                self._advance()
            else:
                self._shut()

    def _stop_writing(self) -> None:
        self._shared.writing.discard(self)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
