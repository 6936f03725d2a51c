"""The master process: gunicorn's arbiter with gmux's settings, worker and words."""

from __future__ import annotations

import resource
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from gmux import net, samples, slots
from gmux.config import Config
from gmux.errors import ConfigError, StartError
from gmux.listener import max_lingering
from gmux.logs import LOGGER, DropTracebacks

#: Descriptors kept for the process itself and for what it holds on disk; an upstream connection has one and its slot's.
OWN_DESCRIPTORS = 32

#: Seconds beyond a worker's own graceful timeout before the arbiter kills it.
GRACE = 2


class Master(Arbiter):  # type: ignore[misc]
    """gunicorn's arbiter without the signals that one worker with the whole pool cannot follow.

    A second worker would take clients and find no connection left for them; an upgraded one would find the port taken.
    """

    def _ignore(self) -> None:
        LOGGER.warning("this signal is not offered: gmux runs one worker; TERM, INT and QUIT stop it, HUP renews it")

    handle_ttin = handle_ttou = handle_usr2 = _ignore


class ArbiterLog:
    """What gunicorn's arbiter logs, in gmux's log: its talk is dropped, what went wrong stays as it is."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.error_log = self.access_log = LOGGER

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg

    def debug(self, message: str, *args: Any, **kwargs: Any) -> None:
        pass

    def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        pass

    def warning(self, message: str, *args: Any, **kwargs: Any) -> None:
        LOGGER.warning(message, *args)

    def error(self, message: str, *args: Any, **kwargs: Any) -> None:
        LOGGER.error(message, *args, exc_info=kwargs.get("exc_info"))

    def critical(self, message: str, *args: Any, **kwargs: Any) -> None:
        LOGGER.critical(message, *args)

    def exception(self, message: str, *args: Any, **kwargs: Any) -> None:
        LOGGER.error(message, *args, exc_info=True)

    def log(self, level: int, message: str, *args: Any, **kwargs: Any) -> None:
        LOGGER.log(level, message, *args)

    def reopen_files(self) -> None:
        pass

    def close_on_exec(self) -> None:
        pass


class App(BaseApplication):  # type: ignore[misc]
    """One service on a socket that listens already."""

    def __init__(self, config: Config, listening: socket.socket, runtime_dir: Path) -> None:
        self.config = config
        self.runtime_dir = runtime_dir
        self._listening = listening
        super().__init__(prog="gmux")

    def load_config(self) -> None:
        settings = {
            "bind": f"fd://{self._listening.fileno()}",
            "workers": 1,
            "worker_class": "gmux.worker.GmuxWorker",
            "logger_class": ArbiterLog,
            "proc_name": "gmux",
            "graceful_timeout": int(self.config.graceful_timeout) + GRACE,
            "control_socket_disable": True,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return self

    def run(self) -> None:
        Master(self).run()


def fit_descriptors(config: Config) -> Config:
    """Use as many descriptors as the system allows, and take no more clients than they are enough for.

    A client is one, and the usual soft limit is 1024. Clients that took the last ones would leave none for a new
    connection to the target, and with it nobody would be served.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return config
    room = hard - OWN_DESCRIPTORS - 2 * config.pool_size
    if config.max_clients + max_lingering(config.max_clients) <= room:
        return config
    room = max(1, min(room - 16, room * 4 // 5))
    LOGGER.warning(
        "--max-clients: %d is too many for %d descriptors (ulimit -n): %d are taken", config.max_clients, hard, room
    )
    return replace(config, max_clients=room)


def check_codec(config: Config) -> None:
    """Make the codec once: in the worker its failure would be one to try again, without end.

    Raises StartError, ConfigError.
    """
    try:
        codec = config.make_codec()
        config.make_greeting(codec)
        if config.idle_check:
            codec.make_echo_test(1, "0101000000")
    except ConfigError:
        raise
    except Exception as error:  # another package's code: anything may come
        raise StartError(f"cannot load the protocol {config.protocol}: {error!r}") from None


def serve(config: Config) -> None:
    """Run the service until a signal ends it; exits the process. Raises StartError, ConfigError."""
    if config.target is None:
        # Known before the start: in the worker it would be a failure to try again, without end.
        samples.check(config.protocol)
    LOGGER.addFilter(DropTracebacks())
    check_codec(config)
    runtime_dir = slots.runtime_dir()
    listening = net.listen(config.listen)
    LOGGER.info("listening on %s", net.format_address(listening.getsockname()))
    # It may warn; a service that cannot start has said its one line by now.
    config = fit_descriptors(config)
    App(config, listening, runtime_dir).run()
