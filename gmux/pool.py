"""The pool: the upstream connections to one target, who gets one, and who waits.

A gevent semaphore of `pool-size` permits guards it. A permit is taken for an upstream connection that is being made,
is busy, rests, closes, or is one client's own (`gmux.private`). The permits left are the idle connections and those not
made yet, so a request that gets a permit goes out at once or has a connection made. The others wait in line as data,
first come, first served. A connection that becomes free passes its permit on to the first in line; it is given back
only when nobody waits.

Nothing here switches greenlets, except `_connect`, which runs in a greenlet of its own, and `stop`.
"""

from __future__ import annotations

import logging
import random
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import gevent
from gevent.lock import BoundedSemaphore

from gmux import net
from gmux.access import RouteAccess
from gmux.codecs.base import NO_LIMIT, Codec, Part, Request, Unsolicited
from gmux.deadlines import Deadlines
from gmux.errors import AnswerTimeout, ConnectError, ExchangeError, Overloaded, QueueTimeout, Stopped, UpstreamClosed
from gmux.exchange import Asker, Exchange
from gmux.net import RESET_PATIENCE
from gmux.private import PrivateConnections
from gmux.ratelimit import LimitedWarnings
from gmux.scheduler import LONE_SLICE, Share
from gmux.slots import Ask, Grant, Slot, Slots, State, release_after_reset
from gmux.spinner import Spinner
from gmux.strict import StrictUpstream
from gmux.trace import Trace
from gmux.upstream import CLOSE_TIMEOUT, Traits, Upstream, safe_idle_time

#: The longest pause between two attempts to connect, seconds; a longer first one stands.
MAX_RETRY_DELAY = 30.0

#: Each pause is up to this share shorter, so that several gmux do not knock at a target in step.
RETRY_JITTER = 0.25

#: Seconds that the rest of an answer may take whose client is gone, before the connection is closed instead.
DISCARD_TIMEOUT = 5.0

#: The longest such time that is told from others, seconds: each has a clock.
MAX_IDLE_LIMIT = 3600.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Times in seconds; 0 turns a limit off.

    `hears`: messages that nobody asked for are framed, and `unsolicited` says what is done with them.
    """

    target: net.Address
    size: int = 1
    minimum: int = 1
    pipeline: int = 1
    prefer_pipeline: bool = False
    late_window: float = 120.0
    unsolicited: str = "close"
    hears: bool = False
    greeting: Request | None = None
    idle_check: float = 0.0
    queue_limit: int = 10_000
    queue_timeout: float = 30.0
    connect_timeout: float = 10.0
    timeout: float = 60.0
    connect_delay: float = 0.0
    request_delay: float = 0.0
    retry_delay: float = 1.0
    idle_timeout: float = 0.0
    max_age: float = 0.0
    private_timeout: float = 5.0


@dataclass(frozen=True, slots=True)
class PoolParts:
    """What a pool works with. `trace` and `access` are there when they are asked for."""

    codec: Codec
    slots: Slots
    share: Share
    spinner: Spinner
    log: logging.Logger
    trace: Trace | None = None
    access: RouteAccess | None = None


#: Seconds without use after which another process's need of an idle connection goes before one's own.
SPARE_TIME = 0.05

#: What is done with a message of the target that nobody asked for. AUTO drops it where its type shows that it answers
#: nothing in flight, and closes the connection where that cannot be read.
AUTO, CLOSE, DROP, BROADCAST = "auto", "close", "drop", "broadcast"


class OwnAsker:
    """Who asks for gmux itself: for a greeting or a check. It only needs to know that no answer came."""

    name = "gmux"

    def __init__(self, told: Callable[[Exchange, ExchangeError | None], None]) -> None:
        self._told = told

    def deliver(self, exchange: Exchange, part: Part) -> None:
        if part.last:
            self._told(exchange, None)

    def fail(self, exchange: Exchange, error: ExchangeError) -> None:
        self._told(exchange, error)


class Pool:
    """One target's upstream connections. Made by the route, which calls `start` and `stop`."""

    def __init__(self, settings: PoolSettings, parts: PoolParts) -> None:
        self._settings = settings
        self._codec = parts.codec
        self._slots = parts.slots
        self._kick: Callable[[], None] = parts.spinner.kick
        self._log = parts.log
        self.warn = LimitedWarnings(parts.log)
        self._trace = parts.trace
        self._access = parts.access
        is_verbose = parts.trace is not None or parts.access is not None
        self._traits = Traits(
            parts.share, parts.spinner.kick, is_verbose, settings.hears, settings.pipeline, settings.late_window
        )
        self._permits = BoundedSemaphore(settings.size)
        # The one that was used last stands last.
        self._idle: dict[Upstream, None] = {}
        self._upstreams: dict[Upstream, Slot] = {}
        self._connecting: set[gevent.Greenlet[..., None]] = set()
        self._waiting = self._make_line()
        self._answering: Deadlines[Upstream] = Deadlines(settings.timeout, self._answer_timed_out)
        self._discarding: Deadlines[Exchange] = Deadlines(DISCARD_TIMEOUT, self._discard_timed_out)
        self._warming: Deadlines[Upstream] = Deadlines(settings.connect_delay, self._greet)
        self._resting: Deadlines[Upstream] = Deadlines(settings.request_delay, self._rested)
        self._idling: Deadlines[Upstream] = Deadlines(settings.idle_timeout, self._idle_timed_out)
        self._aging: Deadlines[Upstream] = Deadlines(settings.max_age, self._aged)
        self._closing: Deadlines[Upstream] = Deadlines(CLOSE_TIMEOUT, Upstream.abort)
        # By the seconds for which targets say that they keep an idle connection; mostly there is one, or none.
        self._limits: dict[float, Deadlines[Upstream]] = {}
        self._checking: Deadlines[Upstream] = Deadlines(settings.idle_check, self._check)
        self._private = PrivateConnections(
            settings.size,
            settings.private_timeout,
            settings.request_delay,
            settings.queue_timeout,
            self._queue_timed_out,
            self.repeat,
            parts.log,
            self.warn,
        )
        self._ties = self._private.ties
        self._own = OwnAsker(self._told)
        self._watches_idle = bool(settings.idle_timeout or settings.idle_check)
        self._checks = 0
        # Those that are asked for a sign of life: that is no use, so their clocks of idle time go on.
        self._checked: set[Upstream] = set()
        #: Called with each message for all clients.
        self.broadcast: Callable[[bytes], None] = lambda message: None
        self._failures = 0
        self._retry_timer: Any = None
        self._last_error = ConnectError("the target was not tried yet")
        self._is_stopping = False
        self._is_draining = False
        # How often each idle connection had been used, when it was last looked at for others.
        self._seen: dict[Upstream, int] = {}
        self._looked = monotonic()
        # Those that end so that others may have their slots.
        self._promised: dict[Upstream, Ask] = {}
        self._rests = bool(settings.request_delay or settings.max_age)
        # Two calls of upstream connections, without a layer between: they are on the hot path.
        self.sent = self._answering.add
        self._listen_to_asks(False)

    def _make_line(self) -> Deadlines[Exchange]:
        """The queue of those who wait for a connection."""
        return Deadlines(self._settings.queue_timeout, self._queue_timed_out)

    def start(self) -> None:
        """Open the connections that are to be kept."""
        self._slots.open(self)
        self._settle()

    @property
    def is_empty(self) -> bool:
        return not self._upstreams

    def unmade(self) -> int:
        """The connections that there may be, and are not."""
        return self._settings.size - len(self._upstreams)

    def drain(self) -> None:
        """Keep no connection that nobody needs here; others may have them."""
        self._is_draining = True
        self._private.retire_free("gmux lets its clients go")
        self.lend()

    def stop(self) -> None:
        """Close all upstream connections, which takes CLOSE_TIMEOUT and RESET_PATIENCE at most; switches greenlets.

        May be called twice.
        """
        if self._is_stopping:
            return
        self._slots.close()
        self._is_stopping = True
        if self._retry_timer is not None:
            self._retry_timer.stop()
        gevent.killall(list(self._connecting))
        # One that was killed before its first step could not give its permit back.
        for _ in self._connecting:
            self._permits.release()
        self._connecting.clear()
        for upstream in list(self._upstreams):
            upstream.fail(Stopped("gmux is stopping"))
        with gevent.Timeout(CLOSE_TIMEOUT + RESET_PATIENCE + 0.1, False):
            for _ in range(self._settings.size):
                self._permits.acquire()
            self._slots.join()
        self.warn.flush()

    # What a client calls.

    def checkout(self, exchange: Exchange) -> None:
        """Send the exchange's request now, or queue it; its asker hears of the end. Never raises."""
        if self._ties and self._private.use(exchange):
            return
        while self._permits.acquire(blocking=False):
            if not self._idle:
                self._open()
                break
            # Last in, first out: what is not needed grows idle and can be closed.
            upstream = self._idle.popitem()[0]
            if not upstream.is_stale() or upstream.catch_up():
                upstream.send(exchange)
                return
        self._queue(exchange)

    def _queue(self, exchange: Exchange) -> None:
        if self._retry_timer is not None and self._is_down:
            # Until the next attempt the target is known to be down: waiting would help nobody.
            exchange.asker.fail(exchange, self._last_error)
        elif len(self._waiting) >= self._settings.queue_limit + len(self._connecting):
            # Those that a new connection is being made for do not wait for others.
            exchange.asker.fail(exchange, Overloaded(f"{self._settings.queue_limit} requests wait (--queue-limit)"))
        else:
            self._waiting.add(exchange)
            if self._connecting:
                self._slots.hurry()

    def abandon(self, exchange: Exchange) -> None:
        """The asker is gone. A request not sent yet is forgotten; an answer on its way is read and dropped."""
        exchange.is_abandoned = True
        if exchange in self._waiting:
            self._waiting.discard(exchange)
            exchange.close()
        elif self._private.abandon(exchange):
            exchange.close()
        else:
            self._discarding.add(exchange)

    def forget(self, exchange: Exchange) -> None:
        """An abandoned exchange has ended."""
        self._discarding.discard(exchange)
        exchange.close()

    def dismiss(self, asker: Asker) -> None:
        """The asker sends no more requests: a connection that is its own ends."""
        if self._ties:
            self._private.dismiss(asker)

    # What an upstream connection calls (`upstream.Owner`), beside `sent` and `freed`.

    def bound(self, upstream: Upstream, exchange: Exchange) -> None:
        self._answering.discard(upstream)
        if exchange.is_abandoned:
            upstream.retire("the client that it belongs to is gone")
        elif self._is_draining:
            upstream.retire("it belongs to a client, and gmux lets its clients go")
        elif upstream.is_aged:
            upstream.retire("it belongs to a client, and is to be replaced")
        else:
            self._private.keep(upstream, exchange.asker)

    def _rest(self, upstream: Upstream) -> None:
        """What comes between two requests when a delay or an age is set."""
        self._answering.discard(upstream)
        if upstream.idle_limit <= self._settings.request_delay:
            upstream.retire(f"the target keeps it for {upstream.idle_limit:g} s, which --request-delay takes")
        elif self._settings.request_delay:
            self._resting.add(upstream)
        else:
            self._rested(upstream)

    def _rested(self, upstream: Upstream) -> None:
        age = monotonic() - upstream.opened
        if self._settings.max_age and age >= self._settings.max_age:
            upstream.retire(f"{age:.0f} s old")
        else:
            self._next(upstream)

    def closing(self, upstream: Upstream, reason: str) -> None:
        if upstream in self._idle:
            # An idle connection has no permit of its own; while it closes it counts like a busy one.
            del self._idle[upstream]
            self._permits.acquire(blocking=False)
        self._stop_clocks(upstream)
        self._closing.add(upstream)
        self._private.drop(upstream)

    def ended(self, upstream: Upstream, reason: str) -> None:
        self._stop_clocks(upstream)
        self._closing.discard(upstream)
        self._checked.discard(upstream)
        slot = self._upstreams.pop(upstream)
        ask = self._promised.pop(upstream, None)
        if ask is None or not self._slots.give(ask, slot):
            slot.release()
        if upstream in self._idle:
            del self._idle[upstream]
        else:
            self._permits.release()
        self._log.info("closed target connection: %s (%s)", upstream.name, reason)
        asked = upstream.used - (self._settings.greeting is not None)
        # What was answered in this turn of the loop may not be delivered yet.
        is_greeted = upstream.greeting is None or upstream.greeting.answered
        if is_greeted and (asked > 0 or monotonic() - upstream.opened >= self._settings.retry_delay):
            self._failures = 0
            if self._retry_timer is not None and not self._upstreams:
                # What failed was one more beside this one. The target took this one, and may take its successor.
                self._retry_timer.stop()
                self._retry_timer = None
        elif not (upstream.is_retired or self._is_stopping):
            # It took the connection only to end it: to knock again at once would be a busy loop.
            hint = f"ends new connections; does it allow {self._settings.size}?"
            if self._settings.greeting is not None:
                hint = "does not answer --on-connect, or ends the connection then"
            self._pause(ConnectError(f"the target {self._where} {hint} ({reason})"))
        self._private.drop(upstream)
        self._settle()

    def repeat(self, exchanges: Iterable[Exchange]) -> None:
        settings = self._settings
        longest = settings.queue_timeout + settings.connect_timeout if settings.queue_timeout else inf
        now = monotonic()
        too_late = []
        for exchange in reversed(tuple(exchanges)):
            if exchange.is_abandoned or exchange.asker is self._own:  # what gmux asks is asked of one connection
                self.forget(exchange)
            elif now - exchange.began >= longest:
                too_late.append(exchange)
            else:
                self._waiting.add_first(exchange, exchange.began + longest - settings.queue_timeout)
        self._settle()
        for exchange in reversed(too_late):
            error = UpstreamClosed(
                f"the target closed the connection, and {longest:g} s (--queue-timeout and --connect-timeout) are over,"
                " so the request is not sent again"
            )
            exchange.asker.fail(exchange, error)

    def unsolicited(self, upstream: Upstream, part: Part) -> str:
        if isinstance(part, Unsolicited) and part.is_handled:
            return ""
        policy = self._settings.unsolicited
        is_known = isinstance(part, Unsolicited)
        is_answer = isinstance(part, Unsolicited) and part.is_answer
        what = self._codec.describe(part.data)
        if policy == CLOSE or (policy == AUTO and not is_known):
            return f"a message came that nobody asked for: {what}"
        if policy == BROADCAST and not is_answer:
            self.broadcast(part.data)
        else:
            kind = "an answer that fits no request" if is_answer else "a message that nobody asked for"
            self.warn("upstream/answer", f"{kind} is dropped: {what}, {upstream.name}")
        return ""

    def saw(self, upstream: Upstream, exchange: Exchange, data: bytes, is_answer: bool) -> None:
        if self._access is not None and not is_answer:
            self._access.put(exchange, upstream.name)
        if self._trace is not None and data:
            ends = (exchange.asker.name, self._where)
            sender, receiver = reversed(ends) if is_answer else ends
            self._trace.message(sender, receiver, upstream.name, data)

    # How connections come about.

    @property
    def _where(self) -> str:
        return net.format_address(self._settings.target)

    @property
    def _is_down(self) -> bool:
        return self._retry_timer is not None and not self._upstreams and not self._connecting

    def _kept(self) -> int:
        """The connections that are there to stay."""
        return sum(not upstream.is_closing for upstream in self._upstreams)

    def _settle(self) -> None:
        """Open what is needed, or fail those who wait in vain. Runs after every change for the worse."""
        if self._is_stopping:
            return
        if self._retry_timer is not None:
            self._refuse_all()
            return
        wanted = self.wanted() - len(self._connecting)
        # The permits of idle connections are theirs.
        while wanted > 0 and self._permits.counter > len(self._idle) and self._permits.acquire(blocking=False):
            self._open()
            wanted -= 1

    def _refuse_all(self) -> None:
        """Fail those who wait while the target is known to be down; thousands of them over several turns."""
        end = monotonic() + LONE_SLICE
        while self._waiting and self._is_down and not self._is_stopping:
            exchange = self._waiting.pop_first()
            exchange.asker.fail(exchange, self._last_error)
            if monotonic() > end:
                # A timer and not a callback: the loop runs callbacks on and on before it looks at sockets again.
                gevent.get_hub().loop.timer(0).start(self._refuse_all)
                return

    def wanted(self) -> int:
        """The connections that are worth making, with those that are being made."""
        minimum = 0 if self._is_draining else self._settings.minimum
        return max(self._needed(len(self._waiting)), minimum - self._kept())

    def need(self) -> int:
        return len(self._waiting)

    def _needed(self, waiting: int) -> int:
        """The connections that so many requests in line are worth."""
        return waiting

    def _open(self) -> bool:
        """Use the permit taken for a new connection, unless it is not the time for one; whether one is being made."""
        if self._retry_timer is not None or self._is_stopping:
            self._permits.release()
            return False
        greenlet = gevent.Greenlet(self._connect)
        self._connecting.add(greenlet)
        greenlet.start()
        return True

    def _connect(self) -> None:
        """Make one connection; runs in a greenlet of its own, which holds a permit."""
        upstream = None
        try:
            upstream = self._make_upstream()
        except ConnectError as error:
            self._pause(error)
        except Exception as error:  # of the keeper of slots or the resolver: whatever it is, those who wait hear of it
            self._pause(ConnectError(f"cannot connect to the target {self._where}: {error!r}"))
        finally:
            # Also when the greenlet is killed: a permit that is not given back is lost.
            self._connecting.discard(gevent.getcurrent())
            if upstream is None:
                self._permits.release()
        if upstream is None:
            self._settle()
        elif upstream.used:
            self._next(upstream)
        elif self._settings.connect_delay:
            self._warming.add(upstream)
        else:
            self._greet(upstream)

    def _make_upstream(self) -> Upstream | None:
        """A connection, new or of another process; None: it is not wanted any more. Switches. Raises ConnectError."""
        grant = self._slots.acquire()
        if grant is None:
            return None
        if grant.sock is not None:
            try:
                return self._take_over(grant)
            except ConnectError as error:  # it ended on its way, which is no sign of a target that is down
                self._log.debug("%s", error)
                return None
        self._log.info("creating target connection")
        try:
            sock = net.connect(self._settings.target, self._settings.connect_timeout)
        except ConnectError:
            grant.slot.release()
            raise
        except BaseException:
            # Killed, perhaps in the moment in which the target accepted the connection.
            release_after_reset(grant.slot)
            raise
        upstream = self._add(grant.slot, sock)
        self._log.info("new target connection: %s", upstream.name)
        return upstream

    def _add(self, slot: Slot, sock: socket.socket) -> Upstream:
        """A connected socket becomes one of the pool's connections. Raises ConnectError; both are given back then."""
        try:
            sock = slot.above(sock)
        except OSError as error:  # no descriptor left
            Grant(slot, sock).give_back()
            raise ConnectError(f"cannot connect to the target {self._where}: {error.strerror}") from None
        try:
            upstream = self._wrap(sock)
        except OSError as error:  # it has ended before it could be named
            Grant(slot, sock).give_back()
            raise ConnectError(f"the target {self._where} ends new connections ({error.strerror})") from None
        except BaseException:  # a codec's own fault, of another package perhaps
            Grant(slot, sock).give_back()
            raise
        self._upstreams[upstream] = slot
        if self._settings.max_age:
            self._aging.add(upstream)
        return upstream

    def _take_over(self, grant: Grant) -> Upstream:
        """Another process's connection becomes one of the pool's. Raises ConnectError; the grant is given back then."""
        assert grant.sock is not None
        grant.sock.setblocking(False)
        upstream = self._add(grant.slot, grant.sock)
        # One that was used before may end at any time, as its next request may find out.
        upstream.used = grant.used + 1
        self._log.debug("took over target connection: %s", upstream.name)
        return upstream

    # How connections are shared with other processes (`slots.Lender`, beside `wanted` and `need`).

    def _listen_to_asks(self, is_on: bool) -> None:
        """While others ask, each connection that becomes free is looked at; else nothing is paid for them."""
        self._next = self._lend_or_hand_over if is_on else self._hand_over
        self.freed = self._rest if self._rests else self._next

    def lend(self) -> None:
        self._listen_to_asks(True)
        now = monotonic()
        is_time = now - self._looked >= SPARE_TIME
        # The one that was used last goes to the next request, so those that nobody needs stay in front.
        for upstream in list(self._idle):
            is_spare = self._seen.get(upstream) == upstream.used
            ask = self._slots.next_ask(self._state(is_spare and is_time))
            if ask is None:
                break
            if upstream in self._idle:
                self._give(upstream, ask)
        if is_time:
            self._looked = now
            self._seen = {upstream: upstream.used for upstream in self._idle}

    def _state(self, is_spare: bool = False) -> State:
        if self._waiting:
            return State.BUSY
        if self._is_draining:
            return State.DRAINING
        if is_spare:
            return State.SPARE
        # One with an age cannot be handed over, and is not closed for a moment's rest.
        return State.BUSY if self._settings.max_age else State.IDLE

    def _lend_or_hand_over(self, upstream: Upstream) -> None:
        if not self._slots.has_asks():
            self._listen_to_asks(False)
        elif self._waiting and upstream.is_fresh:
            # It came for a request. To give it away first would be to serve nobody, where it takes long to come.
            upstream.is_fresh = False
            self._slots.begin_slice()
        elif upstream.greeting is None and (ask := self._slots.next_ask(self._state())):
            self._make_idle(upstream)
            self._give(upstream, ask)
            self._go_on()
            return
        self._hand_over(upstream)

    def _give(self, upstream: Upstream, ask: Ask) -> None:
        """Hand an idle connection over, or close it and hand over its slot."""
        if upstream.is_stale():
            return  # what came is dealt with first; it asks again
        self._slots.met(ask)
        is_movable = upstream.is_clean and not self._settings.max_age and upstream not in self._checked
        if not is_movable or not self._slots.is_kin(ask):
            # Its slot alone goes there, when it has ended. Were it set free, this pool might be the first to take it.
            self._promised[upstream] = ask
            upstream.retire("another gmux needs it")
            return
        if not self._slots.give(ask, self._upstreams[upstream], upstream.sock, upstream.used):
            return  # it asks again
        # To share is usual, and may be often; to end is not.
        self._log.log(
            logging.INFO if self._is_draining else logging.DEBUG, "handed over target connection: %s", upstream.name
        )
        upstream.let_go()
        self._stop_clocks(upstream)
        del self._idle[upstream]
        del self._upstreams[upstream]

    def _go_on(self) -> None:
        """Serve those who wait with what there is."""
        for upstream in list(self._idle):
            if self._waiting and self._permits.acquire(blocking=False):
                del self._idle[upstream]
                self._hand_over(upstream)
        self._settle()

    def adopt(self, grant: Grant) -> bool:
        # More than its own size may come where a reload made that smaller.
        if grant.sock is None or self._is_stopping or len(self._upstreams) >= self._settings.size:
            grant.give_back()
            return True
        if not self._permits.acquire(blocking=False):
            return False  # they are with connections that are being made
        try:
            upstream = self._take_over(grant)
        except ConnectError:
            self._permits.release()
        else:
            self._next(upstream)
        return True

    def leads_to_target(self, sock: socket.socket) -> bool:
        return net.leads_to(sock, self._settings.target)

    def revoke(self, slot: Slot) -> None:
        for upstream, held in self._upstreams.items():
            if held is slot:
                upstream.is_retired = True  # it is no sign of a target that is down
                upstream.fail(UpstreamClosed("its slot is another gmux's, as its file was removed"))
                # Not in good order: for each moment more there is one too many.
                upstream.abort()
                return

    def _wrap(self, sock: socket.socket) -> Upstream:
        """The connection over a connected socket. Raises OSError when that has ended already."""
        return StrictUpstream(self, sock, self._codec.answer_decoder(), self._traits)

    def _greet(self, upstream: Upstream) -> None:
        """Send what --on-connect says, if there is something; then the connection is free as behind any answer."""
        request = self._settings.greeting
        if request is None:
            self._rested(upstream)
        elif upstream.is_closing:
            pass
        elif upstream.is_put_off:
            # What has come already is not the answer to it.
            upstream.later(partial(self._greet, upstream))
        else:
            upstream.greeting = Exchange(self._own, request)
            upstream.send(upstream.greeting)

    def _told(self, exchange: Exchange, error: ExchangeError | None) -> None:
        """A greeting or a check was answered, or was not: then its connection is closed, or closing, already."""
        if error is not None:
            self._log.warning("%s (%s)", error, error.cause)
            return
        for upstream in self._upstreams:
            if upstream.greeting is exchange:
                upstream.greeting = None

    def _check(self, upstream: Upstream) -> None:
        """Ask for a sign of life on an idle connection."""
        if upstream not in self._idle:
            return  # busy; the clock starts anew when it is idle again
        del self._idle[upstream]
        self._permits.acquire(blocking=False)
        if not upstream.is_stale() or upstream.catch_up():
            self._checked.add(upstream)
            self._checks = self._checks % 999_999 + 1
            when = time.strftime("%m%d%H%M%S", time.gmtime())
            upstream.send(Exchange(self._own, self._codec.make_echo_test(self._checks, when)))

    def _pause(self, error: ConnectError) -> None:
        """Let the target rest after a failed attempt, each time longer."""
        self._last_error = error
        if self._retry_timer is not None:
            return
        first = self._settings.retry_delay
        delay = min(first * 2 ** min(self._failures, 16), max(first, MAX_RETRY_DELAY))
        delay *= 1 - random.random() * RETRY_JITTER
        self._failures += 1
        self._log.warning("%s; next attempt in %.1f s", error, delay)
        self._retry_timer = gevent.get_hub().loop.timer(delay)
        self._retry_timer.start(self._retry)

    def _retry(self) -> None:
        self._retry_timer = None
        self._settle()

    def _hand_over(self, upstream: Upstream) -> None:
        """The connection is free: it goes to the first in line with its permit, or becomes idle."""
        if not self._waiting:
            self._make_idle(upstream)
        elif not upstream.is_stale() or upstream.catch_up():
            # Else its end, or what nobody asked for, came right behind the answer.
            # `pop_first` without its call: this is what the target waits for.
            upstream.send(self._waiting.popitem(last=False)[0])

    def _make_idle(self, upstream: Upstream) -> None:
        self._answering.discard(upstream)
        self._kick()
        self._idle[upstream] = None
        self._permits.release()
        if self._watches_idle or upstream.idle_limit != NO_LIMIT:
            self._watch_idle(upstream)

    # The clocks.

    def _watch_idle(self, upstream: Upstream) -> None:
        """Start the clocks of an idle connection."""
        if self._settings.idle_timeout and (upstream not in self._checked or upstream not in self._idling):
            self._idling.add(upstream)
        self._checked.discard(upstream)
        if self._settings.idle_check:
            self._checking.add(upstream)
        if upstream.idle_limit != NO_LIMIT:
            self._watch_limit(upstream)

    def _watch_limit(self, upstream: Upstream) -> None:
        """Close the connection before the target does, if it stays idle."""
        limit = min(upstream.idle_limit, MAX_IDLE_LIMIT)
        clock = self._limits.get(limit)
        if clock is None:
            clock = self._limits[limit] = Deadlines(safe_idle_time(limit), partial(self._limit_over, limit))
        clock.add(upstream)

    def _limit_over(self, limit: float, upstream: Upstream) -> None:
        # The target may have said something else since this clock was started.
        if upstream in self._idle and min(upstream.idle_limit, MAX_IDLE_LIMIT) == limit:
            upstream.retire(f"idle, and the target keeps it for {upstream.idle_limit:g} s")

    def _stop_clocks(self, upstream: Upstream) -> None:
        clocks = (self._answering, self._warming, self._resting, self._idling, self._aging, self._checking)
        for clock in (*clocks, *self._limits.values()):
            clock.discard(upstream)

    def _queue_timed_out(self, exchange: Exchange) -> None:
        limit = f"{self._settings.queue_timeout:g} s (--queue-timeout)"
        exchange.asker.fail(exchange, QueueTimeout(f"no upstream connection became free within {limit}"))

    def _answer_timed_out(self, upstream: Upstream) -> None:
        upstream.fail(AnswerTimeout(f"the target was silent for {self._settings.timeout:g} s (--timeout)"))

    def _discard_timed_out(self, exchange: Exchange) -> None:
        error = UpstreamClosed(f"the client is gone and its answer goes on after {DISCARD_TIMEOUT:g} s")
        for upstream in list(self._upstreams):
            upstream.discard(exchange, error)

    def _idle_timed_out(self, upstream: Upstream) -> None:
        if upstream not in self._idle:
            return  # busy; the clock starts anew when it is idle again
        if self._kept() > self._settings.minimum:
            upstream.retire(f"idle for {self._settings.idle_timeout:g} s")
        else:
            self._idling.add(upstream)

    def _aged(self, upstream: Upstream) -> None:
        upstream.is_aged = True
        reason = f"{self._settings.max_age:g} s old"
        if upstream in self._idle:
            upstream.retire(reason)
        else:
            self._private.aged(upstream, reason)
