"""Every setting, declared once. Flags, help, the file, variables and the reference come from here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from gmux.codecs import registry
from gmux.errors import ConfigError
from gmux.kinds import (
    ACCESS_LOG,
    CORRELATION,
    DELAY,
    FIELD,
    FILE,
    FLAG,
    FOLDER,
    FORWARDED,
    GROUP,
    HOST,
    KEY_FIELDS,
    LEVEL,
    LISTEN,
    LOG_FILE,
    MEMORY,
    MESSAGE_FILE,
    MODE,
    NAME,
    OWNER,
    PATH,
    POSITIVE_SECONDS,
    SECONDS,
    SIZE,
    SIZE_OR_NONE,
    SPEC,
    SPIN,
    TARGET,
    UNSOLICITED,
    USER,
    WORKER_TIMEOUT,
    Kind,
    choice,
    count,
)


def _parse_protocol(text: str) -> str:
    if text not in registry.names():
        raise ValueError
    return text


def default_spin() -> str:
    """Spinning takes a processor from those that the loop waits for, so it needs two."""
    return "50us" if len(os.sched_getaffinity(0)) > 1 else "0"


PROTOCOL = Kind("PROTO", "", _parse_protocol)

ISO8583 = ("iso8583", "mpu")
MESSAGES = ("echo", *ISO8583)
HTTP = ("http",)

#: The groups whose settings each route has; the others are those of the service.
ROUTE_GROUPS = ("Route", "Pool", "Clients", "HTTP")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `name` is its attribute; its flag is the name with dashes, after `no-` where it is on by default.

    `default` is text like any value; empty: there is none. `protocols` are those that it is for; empty: all. With
    `is_of_codec` their codecs are made with it, by its name. `is_fixed`: a reload does not change it.
    """

    name: str
    kind: Kind
    default: str | Callable[[], str]
    help: str
    group: str
    short: str = ""
    protocols: tuple[str, ...] = ()
    is_of_codec: bool = True
    is_fixed: bool = False

    @property
    def flag(self) -> str:
        return ("--no-" if self.is_on else "--") + self.name.replace("_", "-")

    @property
    def is_on(self) -> bool:
        """Whether it is a flag that turns off what is on by default."""
        return self.kind is FLAG and self.default == "true"

    @property
    def default_text(self) -> str:
        return self.default if isinstance(self.default, str) else self.default()

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(registry.names()) if self.kind is PROTOCOL else self.kind.allowed

    @property
    def default_value(self) -> Any:
        text = self.default_text
        return self.parse(text) if text else self.kind.empty

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return "GMUX_" + self.name.upper()

    def parse(self, text: str | list[str]) -> Any:
        """The value that `text` stands for, or several texts of a setting that repeats.

        Raises ConfigError, whose text is for behind the name of the place where the value was given.
        """
        if isinstance(text, list):
            return tuple(self.parse(each) for each in text)
        try:
            return self.kind.parse(text)
        except ValueError:
            raise ConfigError(f"{text!r} is not allowed: {self._hint(text)}{self.allowed}") from None

    def _hint(self, text: str) -> str:
        close = get_close_matches(text, registry.names(), 1) if self.kind is PROTOCOL else []
        return f"did you mean {close[0]}? " if close else ""


SETTINGS: tuple[Setting, ...] = (
    Setting("config", FILE, "", "a file of settings and routes", "Configuration"),
    Setting("protocol", PROTOCOL, "echo", "how messages are framed; see `gmux list`", "Route", "-p"),
    Setting("listen", LISTEN, "8000", "where clients connect; a bare port is all addresses", "Route", "-l"),
    Setting("target", TARGET, "127.0.0.1:1234", "where requests go; `embedded`: a sample target inside", "Route", "-t"),
    Setting("listen_mode", MODE, "0660", "mode of the Unix socket of --listen", "Route"),
    Setting("listen_owner", OWNER, "", "owner of the Unix socket of --listen", "Route"),
    Setting("pool_size", count(1, 1000), "1", "upstream connections to the target, at most", "Pool"),
    Setting("pool_min", count(0, 1000), "1", "of these, opened at start and kept (0 with an idle timeout)", "Pool"),
    Setting("budget", NAME, "", "share --pool-size with all that say the same name", "Pool"),
    Setting("pipeline", count(1, 10_000), "1", "requests in flight on a connection, at most", "Pool"),
    Setting("prefer_pipeline", FLAG, "false", "fill a connection before another is opened", "Pool"),
    Setting("correlation", CORRELATION, "auto", "how answers find requests", "Pool", protocols=ISO8583),
    Setting("spec", SPEC, "auto", "the fields of messages: auto, ascii, binary or a file", "Pool", protocols=ISO8583),
    Setting("key_fields", KEY_FIELDS, "", "fields by which answers find requests", "Pool", protocols=ISO8583),
    Setting("late_window", SECONDS, "120s", "reserve the key of a request without answer", "Pool", "", ISO8583, False),
    Setting("unsolicited", UNSOLICITED, "auto", "messages nobody asked for", "Pool", "", MESSAGES, False),
    Setting("answer_network_management", FLAG, "false", "answer 0800 messages here", "Pool", protocols=ISO8583),
    Setting("on_connect", MESSAGE_FILE, "", "a message to send on each new connection", "Pool", "", MESSAGES, False),
    Setting("idle_check", DELAY, "0", "send an echo test on a connection idle for so long", "Pool", "", ISO8583, False),
    Setting("queue_limit", count(0, 1_000_000), "10000", "requests that may wait for a connection", "Pool"),
    Setting("queue_timeout", SECONDS, "30s", "longest wait for a connection", "Pool"),
    Setting("connect_timeout", POSITIVE_SECONDS, "10s", "longest time to make a connection", "Pool"),
    Setting("timeout", SECONDS, "60s", "longest silence of the target from request to answer", "Pool"),
    Setting("connect_delay", DELAY, "0", "rest of a new connection before its first request", "Pool"),
    Setting("request_delay", DELAY, "0", "rest of a connection between an answer and a request", "Pool"),
    Setting("retry_delay", POSITIVE_SECONDS, "1s", "pause after a failed connect; doubles up to 30s", "Pool"),
    Setting("upstream_idle_timeout", SECONDS, "0", "close a connection above --pool-min idle for so long", "Pool"),
    Setting("upstream_max_age", SECONDS, "0", "replace a connection as old as this", "Pool"),
    Setting(
        "private_timeout", POSITIVE_SECONDS, "5s", "how long a client's own connection waits", "Pool", "", HTTP, False
    ),
    Setting("max_clients", count(1, 1_000_000), "10000", "clients connected at once; more are refused", "Clients"),
    Setting("max_message", SIZE, "16M", "largest message", "Clients"),
    Setting("request_timeout", SECONDS, "30s", "longest time from a request's first byte to its last", "Clients"),
    Setting("client_idle_timeout", SECONDS, "0", "close a client without a request for so long", "Clients"),
    Setting("client_write_timeout", SECONDS, "60s", "close a client that takes nothing of its answer", "Clients"),
    Setting("spool_memory", SIZE, "256k", "of a message held in memory; above, a temporary file", "Clients"),
    Setting("spool_limit", SIZE, "1G", "of one request or answer held, in memory and file", "Clients"),
    Setting("via", FLAG, "true", "leave the Via field as it is", "HTTP", protocols=HTTP),
    Setting("forwarded", FORWARDED, "off", "tell the target who asked", "HTTP", protocols=HTTP),
    Setting("set_header", FIELD, "", "set a field of each request; repeat for more", "HTTP", protocols=HTTP),
    Setting("host", HOST, "", "the Host that the target gets", "HTTP", protocols=HTTP),
    Setting("workers", count(1, 1000), "1", "worker processes; at most --pool-size", "Service"),
    Setting("worker_timeout", WORKER_TIMEOUT, "30s", "replace a worker that gives no sign of life", "Service"),
    Setting("graceful_timeout", POSITIVE_SECONDS, "30s", "time for requests under way after TERM", "Service"),
    Setting("memory_limit", MEMORY, "512M", "held in memory for all clients together", "Service"),
    Setting("disk_limit", SIZE_OR_NONE, "4G", "in the temporary file of each worker", "Service"),
    Setting("spin", SPIN, default_spin, "poll, not sleep, while an answer may come; 0 saves CPU", "Service"),
    Setting("name", NAME, "gmux", "name of the service in the list of processes", "Process"),
    Setting("daemon", FLAG, "false", "run in the background", "Process", is_fixed=True),
    Setting("pid", FILE, "", "a file for the id of the master", "Process"),
    Setting("user", USER, "", "user of the workers", "Process", is_fixed=True),
    Setting("group", GROUP, "", "group of the workers", "Process", is_fixed=True),
    Setting("umask", MODE, "", "mode bits that new files do not get", "Process", is_fixed=True),
    Setting("chdir", FOLDER, "", "folder to run in", "Process", is_fixed=True),
    Setting("runtime_dir", PATH, "", "folder of the slots; see One budget", "Process", is_fixed=True),
    Setting("log_file", LOG_FILE, "", "where the log goes; else standard error", "Logs"),
    Setting("log_level", LEVEL, "info", "debug, info, warning or error", "Logs"),
    Setting("log_format", choice("FORMAT", "text", "json"), "text", "text or json, a line each", "Logs"),
    Setting("access_log", ACCESS_LOG, "", "a line for each request", "Logs"),
    Setting("verbose", FLAG, "false", "dump each message in hex", "Logs", "-v"),
    Setting("unsafe_dump", FLAG, "false", "with -v: show card data of ISO 8583 in full", "Logs"),
    Setting("quiet", FLAG, "false", "log warnings and errors only", "Logs", "-q"),
)

BY_NAME: dict[str, Setting] = {s.name: s for s in SETTINGS}
BY_FLAG: dict[str, Setting] = {s.flag: s for s in SETTINGS}
OF_ROUTES: tuple[Setting, ...] = tuple(s for s in SETTINGS if s.group in ROUTE_GROUPS)
OF_SERVICE: tuple[Setting, ...] = tuple(s for s in SETTINGS if s.group not in ROUTE_GROUPS)
