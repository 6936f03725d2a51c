"""The master process: gunicorn's arbiter in the words of gmux, with its listening sockets, its reload and its limits.

What the arbiter does stays its own: it starts, watches and replaces workers, follows signals, keeps the pid file and
starts the master of an upgrade. Here is what differs, and what an operator is told of it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol

from gunicorn import util
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from setproctitle import setproctitle

from gmux import logs, net, systemd
from gmux.config import RouteConfig, ServiceConfig
from gmux.errors import ConfigErrors, GmuxError, StartError
from gmux.listening import HANDED_OVER, Held, Listening
from gmux.logs import LOGGER, route_logger

#: What gunicorn says as a warning or an error, and how gmux says it; "": another line says it already.
WORDS = {
    "WORKER TIMEOUT (pid:%s)": "worker %s gives no sign of life: it is replaced (--worker-timeout)",
    "Worker (pid:%s) was sent %s!": "worker %s was ended by %s",
    "Worker (pid:%s) was sent %s! Perhaps out of memory?": "worker %s was ended by %s; perhaps memory ran out",
    "Worker (pid:%s) exited with code %s.": "worker %s ended with code %s",
    "Exception in worker process": "the worker failed, please report it",
    "Unhandled exception in main loop": "the master failed and ends the service, please report it",
    "USR2 signal ignored. Child exists.": "USR2 is not followed: an upgrade goes on already",
    "USR2 signal ignored. Parent exists.": "USR2 is not followed: the old master of the last upgrade has not ended",
    "Shutting down: %s": "",
}


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

#: Signals that a worker follows, which wait until it can.
HELD_BACK = (*STOPS, signal.SIGUSR1)

#: Seconds until a worker is started again that could not begin.
WORKER_RETRY_DELAY = 1.0

#: Seconds for which the log does not repeat why no worker can start.
REPEAT_INTERVAL = 60.0


class ArbiterLog:
    """What gunicorn's arbiter logs, in gmux's log: its talk is dropped, what went wrong stays, in words of gmux."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.error_log = self.access_log = LOGGER

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg

    def debug(self, message: str, *args: Any, **kwargs: Any) -> None:
        pass

    def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, level: int, message: str, *args: Any, **kwargs: Any) -> None:
        if message := WORDS.get(message, message):
            LOGGER.log(level, message, *args, exc_info=kwargs.get("exc_info"))

    def warning(self, message: str, *args: Any, **kwargs: Any) -> None:
        self.log(30, message, *args, **kwargs)

    def error(self, message: str, *args: Any, **kwargs: Any) -> None:
        self.log(40, message, *args, **kwargs)

    def critical(self, message: str, *args: Any, **kwargs: Any) -> None:
        self.log(50, message, *args, **kwargs)

    def exception(self, message: str, *args: Any, **kwargs: Any) -> None:
        self.log(40, message, *args, exc_info=True)

    def reopen_files(self) -> None:
        pass

    def close_on_exec(self) -> None:
        pass


class Service(Protocol):
    """What the master manages: gunicorn's application, which has the configuration for it and for the workers."""

    cfg: Any
    config: ServiceConfig
    listening: Listening
    #: Where gmux was started, and where the master of an upgrade starts.
    folder: str

    def keep_folder(self) -> None:
        """Make the runtime folder again when it was removed. Raises StartError."""

    def read_again(self) -> tuple[ServiceConfig, list[Held]]:
        """The configuration as it is now, and the sockets for it. Raises GmuxError; then nothing is changed."""


def in_effect(signals: list[int]) -> list[int]:
    """What is left to do of signals that wait: nothing that comes before a stop, and one reload for several."""
    stops = [number for number in signals if number in STOPS]
    if stops:
        return stops
    return [number for at, number in enumerate(signals) if number != signal.SIGHUP or number not in signals[:at]]


class ReloadCut(Exception):
    """A signal to stop came while a reload waits for its old workers."""


class CannotStart(Exception):
    """A worker could not be started, which is said and tried again."""


class Master(Arbiter):  # type: ignore[misc]
    """gunicorn's arbiter for a service whose sockets are open."""

    def __init__(self, app: Service, *, is_upgrade: bool) -> None:
        self._watchdog = systemd.Watchdog(is_upgrade=is_upgrade)
        self._is_reloading = self._is_incomplete = self._is_to_stop = False
        #: The age of the last worker that a reload under way is to replace.
        self._outdated: int | None = None
        #: A worker between its making and its fork.
        self.unborn: Any = None
        self._retry_at = self._repeat_at = 0.0
        self._trouble = ""
        # Whether there was a worker that served.
        self._has_served = False
        # gunicorn begins each title with its own name, and has no other place to say it.
        util._setproctitle = _set_title
        super().__init__(app)
        self.LISTENERS = app.listening.sockets
        # sys.argv would start `python -m gmux` as a script that finds no package.
        words = [sys.executable, *sys.orig_argv[1:]]
        self.START_CTX = {"args": words, "cwd": app.folder, 0: sys.executable}

    def signal(self, sig: int, frame: Any) -> None:
        self._is_to_stop |= sig in STOPS
        super().signal(sig, frame)

    def _keep_up(self) -> None:
        """What is due in each turn of the main loop, and of the waits of a reload and a stop."""
        self._watchdog.beat()
        logs.retry()

    def wait_for_signals(self, timeout: float = 1.0) -> list[int]:
        self._keep_up()
        # Workers of another user cannot make it, and say so.
        with suppress(StartError):
            self.app.keep_folder()
        signals: list[int] = super().wait_for_signals(min(timeout, self._watchdog.interval or timeout))
        if self._is_incomplete and time.monotonic() >= self._retry_at:
            signals.append(signal.SIGHUP)
        return in_effect(signals)

    def start(self) -> None:
        # gunicorn would tell systemd, too, in words of its own.
        with systemd.silence():
            super().start()
        # Not before: who has read it may send signals.
        tell_listening(zip(self.app.config.routes, self.LISTENERS, strict=True))
        systemd.notify("READY=1", _status(self))

    # Workers.

    def spawn_worker(self) -> int:
        """Raises CannotStart."""
        self._keep_up()
        # gunicorn changes it for a moment, and does not put it back when it fails.
        umask = os.umask(0o077)
        os.umask(umask)
        # Until it has ways of its own with them, a worker would lose them to those of the master.
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            pid: int = super().spawn_worker()
        except (GmuxError, OSError, MemoryError) as error:
            # No process, descriptor or space left, say: what serves goes on, and the main loop comes here again.
            os.umask(umask)
            if self.unborn is not None:
                self.unborn.give_up()
            self._defer(f"cannot start a worker: {getattr(error, 'strerror', '') or str(error) or repr(error)}")
            if self.worker_age == 1:
                raise HaltServer("", 1) from None
            raise CannotStart from None
        finally:
            self.unborn = None
            hear_stops()
        self.WORKERS[pid].close_copies()
        LOGGER.info("worker %d started", pid)
        return pid

    def spawn_workers(self) -> None:
        if time.monotonic() >= self._retry_at:
            with suppress(CannotStart):
                super().spawn_workers()

    def manage_workers(self) -> None:
        if self._outdated is not None and time.monotonic() >= self._retry_at:
            # What a reload could not start, which leaves as many old workers.
            young = sum(worker.age > self._outdated for worker in self.WORKERS.values())
            with suppress(CannotStart):
                for _ in range(self.num_workers - young):
                    self.spawn_worker()
        super().manage_workers()
        if not self._is_reloading:
            self._end_reload()

    def _defer(self, trouble: str) -> None:
        """Start no worker for a moment, during which signals are heard, and say why, but not again and again."""
        now = time.monotonic()
        self._retry_at = now + WORKER_RETRY_DELAY
        if trouble != self._trouble or now >= self._repeat_at:
            self._trouble, self._repeat_at = trouble, now + REPEAT_INTERVAL
            LOGGER.error("%s; tried again every %g s", trouble, WORKER_RETRY_DELAY)

    def reap_workers(self) -> None:
        self._keep_up()
        if self._is_reloading and self._is_to_stop:
            raise ReloadCut
        upgrade = self.reexec_pid
        # A new file of a worker has the time of the wall clock, until it gives its first sign of life.
        self._has_served |= any(worker.tmp.last_update() <= time.monotonic() for worker in self.WORKERS.values())
        try:
            super().reap_workers()
        except HaltServer:
            if not self._has_served:
                raise
            # It is the machine or its configuration: what serves goes on.
            self._defer("a worker cannot start")
        if upgrade and not self.reexec_pid:
            LOGGER.warning("the new master, process %d, has ended: this one goes on", upgrade)

    def handle_ttin(self) -> None:
        route = min(self.app.config.routes, key=lambda route: route.pool_size)
        if any(route.target is None for route in self.app.config.routes):
            LOGGER.warning("TTIN is not followed: the embedded target is inside one worker")
        elif self.num_workers >= route.pool_size:
            LOGGER.warning("TTIN is not followed: %d workers are as many as --pool-size", self.num_workers)
        else:
            super().handle_ttin()

    # The reload.

    def handle_hup(self) -> None:
        if self.master_pid:
            # gunicorn would write the pid file of the old master, which may still be wanted.
            LOGGER.warning("HUP is not followed: the old master, process %d, has not ended", self.master_pid)
            return
        systemd.notify_reloading()
        self._is_incomplete = False
        try:
            config, fitting = self.app.read_again()
        except Exception as error:
            _tell(error)
        else:
            self._reload(config, fitting)
        systemd.notify("READY=1", _status(self))

    def _reload(self, config: ServiceConfig, fitting: list[Held]) -> None:
        self.app.config = config
        self.app.listening.use(fitting)
        self.LISTENERS = self.app.listening.sockets
        self._is_reloading, self._outdated = True, self.worker_age
        try:
            with suppress(CannotStart):
                super().handle_hup()
            self._end_reload()
            if self._outdated is not None:
                LOGGER.error("the reload is not complete: old workers go on until it is")
        except ReloadCut:
            pass
        except Exception:  # no disk space left for the pid file, say
            LOGGER.error("the reload is not complete: it is tried again", exc_info=True)
            self._is_incomplete, self._outdated = True, None
            self._retry_at = time.monotonic() + WORKER_RETRY_DELAY
        finally:
            self._is_reloading = False

    def _end_reload(self) -> None:
        """Say that it is done, if all old workers have ended."""
        if self._outdated is not None and all(worker.age > self._outdated for worker in self.WORKERS.values()):
            self._outdated = None
            LOGGER.info("reloaded")

    def handle_usr1(self) -> None:
        logs.reopen()
        super().handle_usr1()

    # The upgrade.

    def reexec(self) -> None:
        try:
            super().reexec()
        except Exception as error:
            LOGGER.error("the upgrade failed: %s", error)
            if os.getpid() != self.pid:
                # The child that was to become the new master must not do what the old one does at its end.
                os._exit(1)
            return
        if self.reexec_pid:
            LOGGER.info("upgrade: the new master is process %d", self.reexec_pid)

    def maybe_promote_master(self) -> None:
        old = self.master_pid
        try:
            super().maybe_promote_master()
        except (OSError, RuntimeError) as error:
            # The pid file comes last but for the title: the folder may be gone, or the old master not be reaped.
            LOGGER.warning("the pid file stays as it is: %s", error)
            _set_title(f"master [{self.proc_name}]")
        if old and not self.master_pid:
            systemd.notify(f"MAINPID={self.pid}")
            LOGGER.info("the old master, process %d, has ended: this one takes its place", old)

    # The end.

    def stop(self, graceful: bool = True) -> None:
        is_alone = self.reexec_pid == self.master_pid == 0
        if self.LISTENERS:
            LOGGER.info("the master is stopping")
            if self.reexec_pid:
                systemd.notify(f"MAINPID={self.reexec_pid}")
            elif is_alone:
                systemd.notify("STOPPING=1")
        self.app.listening.close(is_last=is_alone)
        self.LISTENERS = []
        super().stop(graceful)

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        if exit_status:
            LOGGER.error("the service ends: its worker cannot start")
        super().halt(None, exit_status)


def _set_title(title: str) -> None:
    setproctitle(f"gmux: {title}")


def _status(master: Master) -> str:
    where = ", ".join(net.format_address(sock.getsockname()) for sock in master.LISTENERS)
    return f"STATUS=listening on {where}"


def _tell(error: Exception) -> None:
    """Log why a reload changes nothing."""
    if isinstance(error, ConfigErrors):
        for problem in error.problems:
            LOGGER.error("%s", problem)
    else:
        LOGGER.error("%s", error if isinstance(error, GmuxError) else f"cannot read the configuration: {error!r}")
    LOGGER.error("the configuration is not changed")


def tell_listening(places: Iterable[tuple[RouteConfig, socket.socket]]) -> None:
    for route, sock in places:
        route_logger(route.name).info("listening on %s", net.format_address(sock.getsockname()))


# gunicorn calls these.


def note_unborn(master: Master, worker: Any) -> None:
    """The fork may fail, and then the worker is to be given up."""
    master.unborn = worker


def leave_groups(master: Master, worker: Any) -> None:
    """In a worker that becomes another user: it would keep the further groups of root.

    gunicorn's own initgroups sets these groups and then not the one of the process.
    """
    cfg = master.cfg
    if cfg.uid != os.geteuid():
        os.initgroups(util.get_username(cfg.uid), cfg.gid)


def hear_stops(worker: Any = None) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)


def tell_ended(master: Master, worker: Any) -> None:
    LOGGER.info("worker %d ended", worker.pid)


def hand_over(master: Master) -> None:
    master.cfg.env_orig[HANDED_OVER] = master.app.listening.hand_over()
