"""The worker process: gunicorn starts, watches and replaces it; it runs the route.

Its life: the arbiter forks it with the listening sockets open; `run` starts the route, beats for the arbiter's watch,
and waits for a signal. TERM drains; INT, QUIT and the loss of the master end it at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import Any

import gevent
from gevent.event import Event
from gunicorn.workers.base import Worker

from gmux import net, samples, slots
from gmux.config import Config
from gmux.logs import LOGGER
from gmux.pool import Slots
from gmux.route import Route

#: Seconds between two signs of life to the arbiter.
BEAT = 1.0


class GmuxWorker(Worker):  # type: ignore[misc]
    """gunicorn's worker contract over one route."""

    def init_process(self) -> None:
        gevent.reinit()
        self._stopping = Event()
        super().init_process()

    def init_signals(self) -> None:
        # The loop must wake for each signal, so they are the loop's own and not Python's.
        for name in self.SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        signal.signal(signal.SIGABRT, self.handle_abort)
        for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)
        gevent.signal_handler(signal.SIGTERM, self._stopping.set)
        for name in (signal.SIGINT, signal.SIGQUIT):
            gevent.signal_handler(name, self._stop_at_once)

    def _stop_at_once(self) -> None:
        lost = self._route.requests_under_way()
        LOGGER.log(logging.WARNING if lost else logging.INFO, "stopped at once; %d requests get no answer", lost)
        os._exit(0)

    def handle_abort(self, sig: int, frame: Any) -> None:
        os._exit(1)

    def load_wsgi(self) -> None:
        """Make the route: gunicorn ends the service when this fails; a `run` that fails is tried again for ever."""
        config: Config = self.app.config
        target = config.target or samples.serve(config.protocol, config.pool_size)
        listening = socket.socket(fileno=os.dup(self.sockets[0].fileno()))
        listening.setblocking(False)
        for inherited in self.sockets:
            # The listener owns the only copy from here on: a second one would hold new clients in the backlog until
            # the end of a drain.
            inherited.close()
        keeper: Slots = (
            slots.FileSlots(self.app.runtime_dir, net.format_address(target), config.pool_size, LOGGER)
            if config.target
            else slots.OwnSlots()
        )
        self._route = Route(config, listening, target, keeper, LOGGER)

    def run(self) -> None:
        route, config = self._route, self.app.config
        # Until the first beat the arbiter takes a time of the wall clock for one of its own, and never misses a sign.
        self.notify()
        route.start()
        while not self._stopping.wait(BEAT):
            self.notify()
            if os.getppid() != self.ppid:
                LOGGER.warning("the master is gone: stopping")
                break
        heart = gevent.spawn(self._beat)
        if not route.drain(config.graceful_timeout):
            LOGGER.warning("requests were cut off after %g s of draining", config.graceful_timeout)
        heart.kill()
        sys.exit(0)

    def _beat(self) -> None:
        while True:
            self.notify()
            gevent.sleep(BEAT)
