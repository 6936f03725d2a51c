"""The worker process: gunicorn starts, watches and replaces it; it runs the routes.

Its life: the arbiter forks it with the listening sockets open; `run` starts the routes, beats for the arbiter's watch,
and waits for a signal. TERM drains; INT, QUIT and the loss of the master end it at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import sys
from contextlib import ExitStack
from traceback import walk_tb
from types import TracebackType
from typing import Any

import gevent
from gevent.event import Event
from gunicorn.workers.base import Worker

from gmux import logs, net, samples
from gmux.access import AccessLog
from gmux.config import RouteConfig, ServiceConfig, budget_name
from gmux.descriptors import Descriptors
from gmux.disk import Disk
from gmux.ends import Ends
from gmux.errors import describe_fault
from gmux.folder import Folder
from gmux.logs import LOGGER
from gmux.memory import Memory
from gmux.route import Common, Route
from gmux.scheduler import Scheduler
from gmux.sharing import SharedSlots
from gmux.slots import Slots
from gmux.spinner import Spinner
from gmux.succession import Succession

#: Seconds between two signs of life to the arbiter, at most.
BEAT = 1.0


class GmuxWorker(Worker):  # type: ignore[misc]
    """gunicorn's worker contract over the routes of a service; `sockets` are theirs, in their order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Before the fork: a worker that drains as soon as this one exists must find it.
        owner = (self.cfg.uid, self.cfg.gid) if os.geteuid() == 0 else (-1, -1)
        with ExitStack() as undo:
            undo.callback(self.tmp.close)
            self._folder = Folder(self.app.runtime_dir)
            undo.callback(self._folder.close)
            self._successions: list[Succession] = []
            for sock in self.sockets:
                succession = Succession(self._folder, sock, owner)
                undo.callback(succession.close)
                self._successions.append(succession)
            self._undo = undo.pop_all()

    def give_up(self) -> None:
        """In the master: there will be no such worker, because the fork failed."""
        self._undo.close()

    def close_copies(self) -> None:
        """What the master has of a worker behind the fork would keep it alive for others."""
        for succession in self._successions:
            succession.close_copy()
        self._folder.close()

    def init_process(self) -> None:
        gevent.reinit()
        gevent.get_hub().print_exception = report_fault
        logs.retry_in(gevent.get_hub().loop)
        self._stopping = Event()
        super().init_process()

    def init_signals(self) -> None:
        # The loop must wake for each signal, so they are the loop's own and not Python's.
        for name in self.SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        signal.signal(signal.SIGABRT, self.handle_abort)
        for name in (signal.SIGUSR2, signal.SIGWINCH, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)
        gevent.signal_handler(signal.SIGTERM, self._stopping.set)
        gevent.signal_handler(signal.SIGUSR1, self._reopen_logs)
        for name in (signal.SIGINT, signal.SIGQUIT):
            gevent.signal_handler(name, self._stop_at_once)

    def _reopen_logs(self) -> None:
        logs.reopen()
        if self._access is not None:
            self._access.reopen()

    def _stop_at_once(self) -> None:
        lost = sum(route.requests_under_way() for route in self._routes)
        LOGGER.log(logging.WARNING if lost else logging.INFO, "stopped at once; %d requests get no answer", lost)
        if self._access is not None:
            self._access.close()
        logs.flush()
        os._exit(0)

    def handle_abort(self, sig: int, frame: Any) -> None:
        os._exit(1)

    def load_wsgi(self) -> None:
        """Make the routes: gunicorn ends the service when this fails; a `run` that fails is tried again for ever."""
        service: ServiceConfig = self.app.config
        self._memory = Memory(service.memory_limit, sum(config.max_clients for config in service.routes))
        common = Common(
            Scheduler(), Spinner(service.spin), self._memory, Disk(service.disk_limit), Ends(), Descriptors()
        )
        self._access = AccessLog(service) if service.access_log else None
        self._routes = [
            self._make_route(config, service, inherited, common, succession)
            for config, inherited, succession in zip(service.routes, self.sockets, self._successions, strict=True)
        ]

    def _make_route(
        self,
        config: RouteConfig,
        service: ServiceConfig,
        inherited: socket.socket,
        common: Common,
        succession: Succession,
    ) -> Route:
        log = logs.route_logger(config.name)
        # The listener owns the only copy from here on: a second one would hold new clients in the backlog until the
        # end of a drain.
        listening = socket.socket(fileno=os.dup(inherited.fileno()))
        listening.setblocking(False)
        inherited.close()
        keeper: Slots
        if config.target is None:
            target: net.Address = samples.serve(config.protocol, config.pool_size)
            keeper = Slots()
        else:
            target = config.target
            keeper = SharedSlots(self._folder, budget_name(config), config.pool_size, _kind_of_connections(config), log)
        return Route(
            config,
            service,
            listening,
            target,
            keeper,
            common,
            log,
            succession,
            access=self._access,
        )

    def run(self) -> None:
        # Until the first beat the arbiter takes a time of the wall clock for one of its own, and never misses a sign.
        self.notify()
        beat = min(BEAT, self.timeout / 2) if self.timeout else BEAT
        for route in self._routes:
            route.start()
        while not self._stopping.wait(beat):
            self.notify()
            self._memory.trim()
            if os.getppid() != self.ppid:
                LOGGER.warning("the master is gone: stopping")
                break
        heart = gevent.spawn(self._beat, beat)
        seconds = self.app.config.graceful_timeout
        drains = [gevent.spawn(route.drain, seconds) for route in self._routes]
        gevent.joinall(drains)
        if not all(drain.get() for drain in drains):
            LOGGER.warning("requests were cut off after %g s of draining", seconds)
        if self._access is not None:
            self._access.close()
        heart.kill()
        sys.exit(0)

    def _beat(self, seconds: float) -> None:
        while True:
            self.notify()
            gevent.sleep(seconds)


def report_fault(context: Any, kind: Any, value: Any, traceback: Any) -> None:
    """Log an error that reached the loop; gevent would print it on a standard error that may be gone."""
    _log_of(traceback).error("gmux has a fault; the service goes on, please report it: %s", describe_fault(value))


def _log_of(traceback: TracebackType | None) -> logging.Logger:
    """That of the route of the first object on the way to the fault that has one."""
    for frame, _ in walk_tb(traceback):
        log = getattr(frame.f_locals.get("self"), "_log", None)
        if isinstance(log, logging.Logger):
            return log
    return LOGGER


def _kind_of_connections(config: RouteConfig) -> str:
    """The same for routes whose open connections are alike: another's may be used as one of its own."""
    what = (config.protocol, config.target, config.on_connect)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
