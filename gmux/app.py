"""The start of a service: what is checked and opened before there is a master, and the settings that gunicorn gets."""

from __future__ import annotations

import os
import pwd
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# gevent loads these late, for the first name to resolve: a worker that has become another user may not be allowed to
# read the folders of Python any more.
import gevent.resolver.thread
import gevent.threadpool  # noqa: F401
from gunicorn import util
from gunicorn.app.base import BaseApplication
from gunicorn.pidfile import Pidfile

from gmux import listening, logs, mailbox, master, samples
from gmux.config import RouteConfig, ServiceConfig
from gmux.descriptors import OF_UPSTREAM, SPARE
from gmux.errors import StartError
from gmux.folder import runtime_dir
from gmux.listener import max_lingering
from gmux.listening import Held, Listening
from gmux.logs import LOGGER
from gmux.master import ArbiterLog, Master
from gmux.memory import ALLOWANCE
from gmux.settings import OF_SERVICE

#: Descriptors of a worker itself (a dozen, with logs) and those that it opens for a moment.
OWN_DESCRIPTORS = 21 + SPARE

#: Those of a route: its listener, and the mailboxes of its slots and of its clients.
ROUTE_DESCRIPTORS = 3

#: Those that an operator may send as soon as there is a process.
EARLY_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)

#: Seconds beyond a worker's own graceful timeout before the arbiter kills it.
GRACE = 2


class App(BaseApplication):  # type: ignore[misc]
    """One service on sockets that listen already."""

    def __init__(
        self,
        config: ServiceConfig,
        load: Callable[[], ServiceConfig],
        sockets: Listening,
        owner: tuple[int, int],
        runtime_dir: Path,
        folder: str,
        *,
        is_upgrade: bool,
    ) -> None:
        self.config = config
        self.listening = sockets
        self.runtime_dir = runtime_dir
        self._owner = owner
        self.folder = folder
        self._load = load
        self._is_upgrade = is_upgrade
        super().__init__(prog="gmux")

    def load_config(self) -> None:
        config = self.config
        uid, gid = self._owner
        settings: dict[str, Any] = {
            "bind": [],
            "workers": config.workers,
            "worker_class": "gmux.worker.GmuxWorker",
            "logger_class": ArbiterLog,
            "proc_name": config.name,
            "pidfile": config.pid or None,
            "timeout": config.worker_timeout,
            "graceful_timeout": int(config.graceful_timeout) + GRACE,
            # A resize of the terminal sends WINCH too: gunicorn follows it in a daemon alone. Without a terminal it
            # can only be meant, so that counts as one.
            "daemon": config.daemon or not has_terminal(),
            "user": uid,
            "group": gid,
            "control_socket_disable": True,
            "pre_fork": master.note_unborn,
            "post_fork": master.leave_groups,
            "post_worker_init": master.hear_stops,
            "child_exit": master.tell_ended,
            "pre_exec": master.hand_over,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return self

    def run(self) -> None:
        try:
            Master(self, is_upgrade=self._is_upgrade).run()
        finally:
            logs.flush()  # of the master, and of each worker, which ends here, too

    def keep_folder(self) -> None:
        """Make the runtime folder again when it was removed. Raises StartError."""
        runtime_dir(str(self.runtime_dir), *self._owner)

    def read_again(self) -> tuple[ServiceConfig, list[Held]]:
        """The configuration as it is now, and the sockets for it. Raises GmuxError; then nothing is changed."""
        config = keep_fixed(self._load(), self.config)
        check(config)
        # It may have been removed meanwhile.
        self.keep_folder()
        fitting = self.listening.fit(config.routes)
        try:
            check_pid_file(config.pid)
            logs.configure(config)
        except BaseException:
            self.listening.give_up(fitting)
            raise
        known = self.listening.sockets
        master.tell_listening([(r, h.sock) for r, h in zip(config.routes, fitting, strict=True) if h.sock not in known])
        config = fit_descriptors(config)
        tell_memory(config)
        return config, fitting


def has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def keep_fixed(config: ServiceConfig, old: ServiceConfig) -> ServiceConfig:
    """`config` with the settings of `old` that a reload does not change."""
    names = [s.name for s in OF_SERVICE if s.is_fixed and getattr(config, s.name) != getattr(old, s.name)]
    files = {route.listen: (route.listen_mode, route.listen_owner) for route in old.routes}
    for route in config.routes:
        wanted = (route.listen_mode, route.listen_owner)
        if isinstance(route.listen, str) and files.get(route.listen, wanted) != wanted:
            LOGGER.warning("mode and owner of %s stay as they are: to change them takes a restart", route.listen)
    for name in names:
        LOGGER.warning("%s stays as it is: to change it takes a restart", name.replace("_", "-"))
    return replace(config, **{name: getattr(old, name) for name in names})


def check(config: ServiceConfig) -> None:
    """Raises ConfigError for what would fail in the worker, where it would be tried again without end."""
    for route in config.routes:
        if route.target is None:
            samples.check(route.protocol)


def check_pid_file(path: str) -> None:
    """Raises StartError; the arbiter would end with a traceback."""
    if not path:
        return
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StartError(f"cannot write the file of --pid, {path}: the folder is not there, or may not be written to")
    if Path(path).exists() and not Path(path).is_file():
        raise StartError(f"cannot use the file of --pid, {path}: it is not a regular file")
    try:
        pid = Pidfile(path).validate()
    except OSError as error:
        raise StartError(f"cannot read the file of --pid, {path}: {error.strerror}") from None
    except OverflowError:
        # No process has such a number; the arbiter would stumble over it, too.
        Path(path).unlink(missing_ok=True)
        pid = None
    if pid and pid != os.getpid():
        raise StartError(f"already running as process {pid}, says the file of --pid, {path}")


def find_owner(config: ServiceConfig) -> tuple[int, int]:
    """User and group of the workers. Raises StartError."""
    uid = os.geteuid() if config.user is None else config.user
    gid = os.getegid() if config.group is None else config.group
    if uid != os.geteuid():
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            raise StartError(f"--user: {uid} is no user of this machine") from None
        # Else they would keep the groups of root.
        gid = entry.pw_gid if config.group is None else gid
    if os.geteuid() != 0 and (uid, gid) != (os.geteuid(), os.getegid()):
        raise StartError("--user and --group: only root can start workers as another user or group")
    return uid, gid


def fit_descriptors(config: ServiceConfig) -> ServiceConfig:
    """Use as many descriptors as the system allows, and take no more clients than they are enough for.

    A client is one, and the usual soft limit is 1024. Clients that took the last ones would leave none for a new
    connection to the target, and with it nobody would be served.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return config
    own = OWN_DESCRIPTORS + sum(map(_of_route, config.routes))
    wanted = sum(map(_of_clients, config.routes))
    if own + wanted <= hard:
        return config
    room = hard - own
    fitted: dict[str, RouteConfig] = {}
    # What a route with few clients leaves of its share is there for the others.
    for left, route in enumerate(sorted(config.routes, key=lambda route: route.max_clients), -len(config.routes)):
        fitted[route.name] = _fit_route(route, room // -left)
        room -= _of_clients(fitted[route.name])
    changes = ", ".join(
        f"{route.max_clients} to {fitted[route.name].max_clients}" + (f" (route {route.name})" if route.name else "")
        for route in config.routes
        if route.max_clients != fitted[route.name].max_clients
    )
    LOGGER.warning(
        "%d descriptors are too few for %d of clients and %d of gmux and its targets: %s;"
        " raise the limit to %d (ulimit -n, or LimitNOFILE= of systemd)",
        hard,
        wanted,
        own,
        f"--max-clients is lowered from {changes}" if changes else "clients or targets may get no connection",
        wanted + own,
    )
    return replace(config, routes=tuple(fitted[route.name] for route in config.routes))


def _of_route(route: RouteConfig) -> int:
    """The descriptors of a route without its clients. A target within has its ends of the connections, too."""
    embedded = route.pool_size + 1 if route.target is None else 0
    return ROUTE_DESCRIPTORS + OF_UPSTREAM * route.pool_size + embedded


def _of_clients(route: RouteConfig) -> int:
    return route.max_clients + max_lingering(route.max_clients)


def _fit_route(route: RouteConfig, room: int) -> RouteConfig:
    if _of_clients(route) <= room:
        return route
    return replace(route, max_clients=max(1, min(room - 16, room * 4 // 5)))


def tell_memory(config: ServiceConfig) -> None:
    """Say so when --memory-limit allows fewer clients than --max-clients does."""
    wanted = sum(route.max_clients for route in config.routes)
    enough = config.memory_limit // ALLOWANCE
    if enough < wanted:
        LOGGER.info(
            "--memory-limit: %d bytes are enough for %d clients in each worker, and --max-clients allows %d",
            config.memory_limit,
            enough,
            wanted,
        )


def find_folder() -> str:
    """Where gmux was started, as its operator named it: a link may lead elsewhere by the time of an upgrade."""
    try:
        return str(util.getcwd())
    except OSError:
        return "/"  # it was removed


def change_folder(path: str) -> None:
    """Raises StartError."""
    try:
        os.chdir(path)
    except OSError as error:
        raise StartError(f"--chdir: cannot use the folder {path}: {error.strerror}") from None


def fill_standard_descriptors() -> None:
    """Where the process was started with one closed, the next file or socket would be taken for it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def set_umask(config: ServiceConfig) -> None:
    if config.umask is not None:
        os.umask(config.umask)


def serve(config: ServiceConfig, load: Callable[[], ServiceConfig]) -> None:
    """Run the service until a signal ends it; exits the process. `load` reads the configuration again, for a reload.

    Raises StartError, ConfigError.
    """
    fill_standard_descriptors()
    for name in EARLY_SIGNALS:
        # The arbiter follows them soon; until then they must not end the process.
        signal.signal(name, signal.SIG_IGN)
    folder = find_folder()
    held, is_upgrade = listening.inherited()
    check(config)
    uid, gid = find_owner(config)
    if config.chdir:
        change_folder(config.chdir)
    set_umask(config)
    logs.configure(config)
    meeting = runtime_dir(config.runtime_dir, uid, gid)
    mailbox.sweep(meeting)
    check_pid_file(f"{config.pid}.2" if config.pid and is_upgrade else config.pid)
    sockets = Listening(held)
    fitting = sockets.fit(config.routes)
    sockets.use(fitting)
    if config.daemon and not is_upgrade:
        umask = os.umask(0)
        logs.flush()
        util.daemonize()
        # It has led the standard descriptors elsewhere.
        logs.reopen()
        # It has set its own.
        os.umask(umask)
    # It may warn; a service that cannot start has said its one line by now.
    config = fit_descriptors(config)
    tell_memory(config)
    try:
        App(config, load, sockets, (uid, gid), meeting, folder, is_upgrade=is_upgrade).run()
    except (RuntimeError, OSError) as error:  # the pid file: another gmux was faster
        sockets.close(is_last=not is_upgrade)
        raise StartError(str(error)) from None
