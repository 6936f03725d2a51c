"""The probe of one pool: it gets the licence to put requests behind one another, or finds out why there is none.

A probe has a free connection for itself for a moment, while clients wait in line as for any answer. Its requests are
gmux's own. They are never sent again, and a connection on which one fails ends, so a late answer reaches nobody.
Nothing here switches greenlets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from gevent import get_hub

from gmux.codecs.base import Part, Probe
from gmux.deadlines import Deadlines
from gmux.errors import AnswerTimeout, ExchangeError
from gmux.exchange import Exchange
from gmux.licence import Licence
from gmux.pipelined import PipelinedUpstream
from gmux.upstream import Upstream

#: Seconds without a part of an answer, and seconds in all, for which a probe has a connection: clients wait meanwhile.
SILENCE, WHOLE = 2.0, 5.0


class Prober:
    """Made by the pool. `released` is called with a connection that the probe has done with, and that is sound."""

    #: It is the asker of its exchanges.
    name = "gmux"

    def __init__(
        self,
        make: Callable[[], Probe | None],
        licence: Licence,
        log: logging.Logger,
        released: Callable[[PipelinedUpstream], None],
    ) -> None:
        self._make = make
        self._licence = licence
        self._log = log
        self._released = released
        # The probe under way. It may be without a connection, when a request made the target close the last one.
        self._probe: Probe | None = None
        self._upstream: PipelinedUpstream | None = None
        # How many answers of the step are not complete.
        self._due = 0
        self._silence: Deadlines[Prober] = Deadlines(SILENCE, Prober._silent)
        self._whole: Deadlines[Prober] = Deadlines(WHOLE, Prober._too_long)
        self._is_stopping = False

    @property
    def is_busy(self) -> bool:
        """Whether it has a connection."""
        return self._upstream is not None

    def begin(self, upstream: PipelinedUpstream) -> bool:
        """Probe on this free connection; whether it is taken."""
        if self._upstream is not None or self._is_stopping:
            return False
        if self._probe is None:
            self._probe = self._make()
        self._whole.add(self)
        upstream.is_held = True
        self._upstream = upstream
        self._go_on(upstream)
        return True

    def stop(self) -> None:
        """Ask nothing more; when what was asked is answered, the connection is free."""
        self._is_stopping = True

    def ended(self, upstream: Upstream, reason: str) -> None:
        """A connection of the pool closes, or is closed."""
        if upstream is self._upstream:
            # Not now: answers that came before its end are delivered in this turn of the loop.
            get_hub().loop.run_callback(self._lost, upstream, reason)

    # What the exchanges call (`exchange.Asker`).

    def deliver(self, exchange: Exchange, part: Part) -> None:
        upstream = self._upstream
        if upstream is None or exchange.upstream is not upstream or self._probe is None:
            return
        self._silence.add(self)
        self._probe.receive(part, upstream.may_pipeline)
        if part.last:
            self._due -= 1
            if not self._due:
                # Not now: the connection may be about to close behind this answer.
                get_hub().loop.run_callback(self._go_on, upstream)

    def fail(self, exchange: Exchange, error: ExchangeError) -> None:
        """Nothing to do: its connection has ended, and `ended` says why."""

    # The steps.

    def _go_on(self, upstream: PipelinedUpstream) -> None:
        if upstream is not self._upstream or upstream.is_closing:
            return
        if self._is_stopping or self._probe is None:
            self._release()
            return
        requests = self._probe.requests()
        if not requests:
            self._conclude(self._probe.objection)
            return
        self._due = len(requests)
        self._silence.add(self)
        for request in requests:
            exchange = Exchange(self, request)
            # Nobody waits for it who would have it sent again.
            exchange.is_abandoned = True
            upstream.send(exchange)

    def _lost(self, upstream: PipelinedUpstream, reason: str) -> None:
        if upstream is not self._upstream:
            return
        probe = self._probe
        self._forget()
        # An end that gmux itself chose says nothing about the target.
        if probe is None or self._is_stopping or upstream.is_retired:
            return
        probe.fail(reason)
        if probe.objection:
            self._conclude(probe.objection)
        else:
            self._probe = probe  # it goes on, on the next connection

    def _conclude(self, objection: str) -> None:
        upstream = self._upstream
        if not objection:
            self._licence.grant()
            self._log.info("the target answers requests that are sent together: they go several at a time")
            self._release()
            return
        pause = self._licence.refuse()
        self._log.warning("%s: requests go one by one; next try in %g s", objection, pause)
        self._forget()
        if upstream is not None:
            upstream.close("the probe failed on it")

    def _release(self) -> None:
        upstream = self._upstream
        self._forget()
        if upstream is not None:
            upstream.is_held = False
            self._released(upstream)

    def _forget(self) -> None:
        self._probe = self._upstream = None
        self._silence.discard(self)
        self._whole.discard(self)

    # The clocks.

    def _silent(self) -> None:
        self._give_up(f"silence for {SILENCE:g} s")

    def _too_long(self) -> None:
        self._give_up(f"it took longer than {WHOLE:g} s")

    def _give_up(self, reason: str) -> None:
        if self._upstream is not None:
            self._upstream.fail(AnswerTimeout(reason))
