"""Every setting, declared once: name, value, default, help. The command line, its help and the checks come from here.

Values are parsed from text, wherever they come from. An error names the setting, the value and what is allowed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gmux.codecs import registry
from gmux.codecs.base import Codec, Limits, Request
from gmux.errors import ConfigError, FramingError

EMBEDDED = "embedded"

_UNITS_OF_TIME = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_UNITS_OF_SIZE = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
MAX_MESSAGE_FILE = 64 * 1024
_MAX_SECONDS = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value: how text becomes it, and what the help and the errors call it.

    A setting whose kind `repeats` may be given many times; its value is a tuple.
    """

    metavar: str
    allowed: str
    parse: Callable[[str], Any]
    repeats: bool = False


def parse_seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)?", text, re.ASCII)
    if match is None:
        raise ValueError
    seconds = float(match[1]) * _UNITS_OF_TIME[match[2] or ""]
    if seconds > _MAX_SECONDS:
        raise ValueError
    return seconds


def parse_spin(text: str) -> float:
    """A time of spinning; microseconds are allowed here alone, and more than a second would be an accident."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)us", text, re.ASCII)
    seconds = float(match[1]) / 1e6 if match else parse_seconds(text)
    if seconds > 1:
        raise ValueError
    return seconds


def parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([kmg]?)(?:i?b)?", text, re.ASCII | re.IGNORECASE)
    if match is None or not int(match[1]):
        raise ValueError
    return int(match[1]) * _UNITS_OF_SIZE[match[2].lower()]


def _count(least: int, most: int) -> Kind:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or not least <= int(text) <= most:
            raise ValueError
        return int(text)

    return Kind("N", f"a whole number from {least} to {most}", parse)


def _choice(metavar: str, *values: str) -> Kind:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError
        return text

    return Kind(metavar, "one of " + ", ".join(values), parse)


def _parse_port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) or int(text) > 65535:
        raise ValueError
    return int(text)


def _split_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError  # IPv6 without brackets: where the port begins would be a guess
    if not colon or re.search(r"[\s/\[\]\x00-\x1f]", host):
        raise ValueError
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError from None
    return host, _parse_port(port)


def parse_listen(text: str) -> tuple[str, int]:
    """A bare port is all addresses, as in tcp-multiplexer."""
    return _split_address(text) if ":" in text else ("", _parse_port(text))


def parse_target(text: str) -> tuple[str, int] | None:
    """None is the embedded target."""
    if text == EMBEDDED:
        return None
    host, port = _split_address(text)
    if not host or not port:
        raise ValueError
    return host, port


def parse_field(text: str) -> tuple[str, str]:
    """A header field: its name, and its value without the blanks around it."""
    match = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\xa0-\xff]*?)[ \t]*", text)
    if match is None:
        raise ValueError
    return match[1], match[2]


def parse_host(text: str) -> str:
    """What stands in a Host field: a name or address, with or without a port."""
    if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", text):
        raise ValueError
    return text


def format_authority(host: str, port: int) -> str:
    """As in a Host field."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_spec(text: str) -> str | dict[str, dict[str, Any]]:
    if text in ("ascii", "binary"):
        return text
    try:
        spec = json.loads(Path(text).read_text())
    except (OSError, ValueError):
        raise ValueError from None
    if not isinstance(spec, dict):
        raise ValueError
    return spec


def parse_message_file(text: str) -> bytes:
    try:
        path = Path(text)
        message = path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_MESSAGE_FILE else b""
    except (OSError, ValueError):
        raise ValueError from None
    if not message:
        raise ValueError
    return message


def parse_key_fields(text: str) -> tuple[str, tuple[int, ...]]:
    """A message type, or empty for all others, and its key fields."""
    match = re.fullmatch(r"(?:([0-9]{4}):)?([0-9]{1,3}(?:,[0-9]{1,3})*)", text, re.ASCII)
    if match is None:
        raise ValueError
    fields = tuple(sorted(int(number) for number in match[2].split(",")))
    if fields[0] < 2 or fields[-1] > 128 or len(set(fields)) < len(fields):
        raise ValueError
    return match[1] or "", fields


def _parse_protocol(text: str) -> str:
    if text not in registry.names():
        raise ValueError
    return text


def default_spin() -> str:
    """Spinning takes a processor from those that the loop waits for, so it needs two."""
    return "50us" if len(os.sched_getaffinity(0)) > 1 else "0"


SECONDS = Kind("TIME", "a time such as 500ms, 10s, 5m, or 0 for no limit", parse_seconds)
DELAY = Kind("TIME", "a time such as 500ms, 10s, 5m, or 0 for none", parse_seconds)
POSITIVE_SECONDS = Kind("TIME", "a time above 0 such as 500ms, 10s, 5m", lambda t: parse_seconds(t) or _refuse_zero())
SPIN = Kind("TIME", "a time such as 50us or 1ms, at most 1s, or 0 for none", parse_spin)
SIZE = Kind("SIZE", "a size in bytes such as 4096, 64k, 16M, 1G", parse_size)
LISTEN = Kind("ADDR", "PORT, HOST:PORT or [IPV6]:PORT, with a PORT from 0 to 65535", parse_listen)
TARGET = Kind("ADDR", "HOST:PORT or [IPV6]:PORT, without http://, or embedded", parse_target)
PROTOCOL = Kind("PROTO", "", _parse_protocol)
CORRELATION = _choice("MODE", "auto", "order", "key")
UNSOLICITED = _choice("MODE", "auto", "close", "drop", "broadcast")
MESSAGE_FILE = Kind("FILE", "a file that can be read, of 1 byte to 64 KiB", parse_message_file)
SPEC = Kind("SPEC", "ascii, binary, or a file of JSON in the form of pyiso8583's specs", parse_spec)
KEY_FIELDS = Kind("FIELDS", "numbers from 2 to 128 such as 11,41, or for one type 0800:7,11", parse_key_fields, True)
FORWARDED = _choice("FORM", "off", "x-forwarded", "forwarded")
FIELD = Kind("FIELD", "NAME: VALUE, or NAME: to remove the field", parse_field, repeats=True)
HOST = Kind("HOST", "HOST or HOST:PORT", parse_host)
FLAG = Kind("", "true or false", lambda text: _choice("", "true", "false").parse(text) == "true")


def _refuse_zero() -> float:
    raise ValueError


ISO8583 = ("iso8583", "mpu")
MESSAGES = ("echo", *ISO8583)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `name` is its attribute; its flag is the name with dashes, after `no-` where it is on by default.

    `default` is text like any value; empty: there is none. `protocols` are those that it is for; empty: all. With
    `is_of_codec` their codecs are made with it, by its name.
    """

    name: str
    kind: Kind
    default: str | Callable[[], str]
    help: str
    group: str
    short: str = ""
    protocols: tuple[str, ...] = ()
    is_of_codec: bool = True

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
        return self.parse(text) if text else () if self.kind.repeats else ""

    def parse(self, text: str | list[str]) -> Any:
        """The value that `text` stands for, or several texts of a setting that repeats. Raises ConfigError."""
        if isinstance(text, list):
            return tuple(self.parse(each) for each in text)
        try:
            return self.kind.parse(text)
        except ValueError:
            raise ConfigError(f"{self.flag}: {text!r} is not allowed: {self._hint(text)}{self.allowed}") from None

    def _hint(self, text: str) -> str:
        close = get_close_matches(text, registry.names(), 1) if self.kind is PROTOCOL else []
        return f"did you mean {close[0]}? " if close else ""


SETTINGS: tuple[Setting, ...] = (
    Setting("protocol", PROTOCOL, "echo", "how messages are framed; see `gmux list`", "Route", "-p"),
    Setting("listen", LISTEN, "8000", "where clients connect; a bare port is all addresses", "Route", "-l"),
    Setting("target", TARGET, "127.0.0.1:1234", "where requests go; `embedded`: a sample target inside", "Route", "-t"),
    Setting("pool_size", _count(1, 1000), "1", "upstream connections to the target, at most", "Pool"),
    Setting("pool_min", _count(0, 1000), "1", "of these, opened at start and kept (0 with an idle timeout)", "Pool"),
    Setting("pipeline", _count(1, 10_000), "1", "requests in flight on a connection, at most", "Pool"),
    Setting("prefer_pipeline", FLAG, "false", "fill a connection before another is opened", "Pool"),
    Setting("correlation", CORRELATION, "auto", "how answers find requests", "Pool", protocols=ISO8583),
    Setting("spec", SPEC, "ascii", "the fields of messages: ascii, binary, or a file", "Pool", protocols=ISO8583),
    Setting("key_fields", KEY_FIELDS, "", "fields by which answers find requests", "Pool", protocols=ISO8583),
    Setting("late_window", SECONDS, "120s", "reserve the key of a request without answer", "Pool", "", ISO8583, False),
    Setting("unsolicited", UNSOLICITED, "auto", "messages nobody asked for", "Pool", "", MESSAGES, False),
    Setting("answer_network_management", FLAG, "false", "answer 0800 messages here", "Pool", protocols=ISO8583),
    Setting("on_connect", MESSAGE_FILE, "", "a message to send on each new connection", "Pool", "", MESSAGES, False),
    Setting("idle_check", DELAY, "0", "send an echo test on a connection idle for so long", "Pool", "", ISO8583, False),
    Setting("queue_limit", _count(0, 1_000_000), "10000", "requests that may wait for a connection", "Pool"),
    Setting("queue_timeout", SECONDS, "30s", "longest wait for a connection", "Pool"),
    Setting("connect_timeout", POSITIVE_SECONDS, "10s", "longest time to make a connection", "Pool"),
    Setting("timeout", SECONDS, "60s", "longest silence of the target from request to answer", "Pool"),
    Setting("connect_delay", DELAY, "0", "rest of a new connection before its first request", "Pool"),
    Setting("request_delay", DELAY, "0", "rest of a connection between an answer and a request", "Pool"),
    Setting("retry_delay", POSITIVE_SECONDS, "1s", "pause after a failed connect; doubles up to 30s", "Pool"),
    Setting("upstream_idle_timeout", SECONDS, "0", "close a connection above --pool-min idle for so long", "Pool"),
    Setting("upstream_max_age", SECONDS, "0", "replace a connection as old as this", "Pool"),
    Setting("max_clients", _count(1, 1_000_000), "10000", "clients connected at once; more are refused", "Clients"),
    Setting("max_message", SIZE, "16M", "largest message", "Clients"),
    Setting("request_timeout", SECONDS, "30s", "longest time from a request's first byte to its last", "Clients"),
    Setting("client_idle_timeout", SECONDS, "0", "close a client without a request for so long", "Clients"),
    Setting("client_write_timeout", SECONDS, "60s", "close a client that takes nothing of its answer", "Clients"),
    Setting("spool_memory", SIZE, "256k", "of a message held in memory; above, a temporary file", "Clients"),
    Setting("spool_limit", SIZE, "1G", "of one request or answer held, in memory and file", "Clients"),
    Setting("memory_limit", SIZE, "512M", "held in memory for all clients together", "Clients"),
    Setting("via", FLAG, "true", "leave the Via field as it is", "HTTP", protocols=("http",)),
    Setting("forwarded", FORWARDED, "off", "tell the target who asked", "HTTP", protocols=("http",)),
    Setting("set_header", FIELD, "", "set a field of each request; repeat for more", "HTTP", protocols=("http",)),
    Setting("host", HOST, "", "the Host that the target gets", "HTTP", protocols=("http",)),
    Setting("graceful_timeout", POSITIVE_SECONDS, "30s", "time for requests under way after TERM", "Service"),
    Setting("spin", SPIN, default_spin, "poll, not sleep, while an answer may come; 0 saves CPU", "Service"),
    Setting("log_format", _choice("FORMAT", "text", "json"), "text", "text or json, a line each", "Service"),
    Setting("verbose", FLAG, "false", "dump each message in hex", "Service", "-v"),
    Setting("unsafe_dump", FLAG, "false", "with -v: show card data of ISO 8583 in full", "Service"),
    Setting("quiet", FLAG, "false", "log warnings and errors only", "Service", "-q"),
)

BY_NAME: dict[str, Setting] = {s.name: s for s in SETTINGS}
BY_FLAG: dict[str, Setting] = {s.flag: s for s in SETTINGS}


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a service with one route, parsed. Times in seconds, sizes in bytes."""

    protocol: str
    listen: tuple[str, int]
    target: tuple[str, int] | None
    pool_size: int
    pool_min: int
    pipeline: int
    prefer_pipeline: bool
    correlation: str
    spec: str | dict[str, dict[str, Any]]
    key_fields: tuple[tuple[str, tuple[int, ...]], ...]
    late_window: float
    unsolicited: str
    answer_network_management: bool
    on_connect: bytes
    idle_check: float
    queue_limit: int
    queue_timeout: float
    connect_timeout: float
    timeout: float
    connect_delay: float
    request_delay: float
    retry_delay: float
    upstream_idle_timeout: float
    upstream_max_age: float
    max_clients: int
    max_message: int
    request_timeout: float
    client_idle_timeout: float
    client_write_timeout: float
    spool_memory: int
    spool_limit: int
    memory_limit: int
    via: bool
    forwarded: str
    set_header: tuple[tuple[str, str], ...]
    host: str
    graceful_timeout: float
    spin: float
    log_format: str
    verbose: bool
    unsafe_dump: bool
    quiet: bool

    def make_codec(self) -> Codec:
        """The codec of the protocol, with its limits and its settings. Raises ConfigError."""
        settings = {s.name: getattr(self, s.name) for s in SETTINGS if s.is_of_codec and self.protocol in s.protocols}
        if "host" in settings:
            settings["authority"] = "localhost" if self.target is None else format_authority(*self.target)
        return registry.load(self.protocol)(Limits(max_message=self.max_message), **settings)

    def make_greeting(self, codec: Codec) -> Request | None:
        """What --on-connect sends. Raises ConfigError."""
        if not self.on_connect:
            return None
        try:
            return codec.make_request(self.on_connect)
        except FramingError as error:
            raise ConfigError(f"--on-connect: the file holds no message of {self.protocol}: {error}") from None


def read(given: Mapping[str, str | list[str]]) -> Config:
    """The configuration from the texts given by setting name; the rest are defaults. Raises ConfigError."""
    values = {s.name: s.parse(given[s.name]) if s.name in given else s.default_value for s in SETTINGS}
    for setting in SETTINGS:
        if setting.name in given and setting.protocols and values["protocol"] not in setting.protocols:
            raise ConfigError(
                f"{setting.flag}: is not allowed with --protocol {values['protocol']}: it is for"
                f" {', '.join(setting.protocols)} alone"
            )
    if values["upstream_idle_timeout"] and "pool_min" not in given:
        values["pool_min"] = 0
    if values["correlation"] == "auto":
        is_by_key = values["protocol"] in ISO8583 and values["pipeline"] > 1
        values["correlation"] = "key" if is_by_key else "order"
    if values["unsolicited"] == "auto":
        values["unsolicited"] = "drop" if values["correlation"] == "key" else "close"
    config = Config(**values)
    if config.pool_min > config.pool_size:
        raise ConfigError(
            f"--pool-min: '{config.pool_min}' is not allowed: at most --pool-size, which is {config.pool_size}"
        )
    if config.upstream_idle_timeout and config.pool_min == config.pool_size:
        raise ConfigError(
            f"--upstream-idle-timeout: is not allowed with --pool-min {config.pool_min}: it closes connections above"
            f" that number, and --pool-size is {config.pool_size}"
        )
    if config.connect_delay and config.queue_timeout and config.connect_delay >= config.queue_timeout:
        raise ConfigError(
            f"--connect-delay: '{config.connect_delay:g}s' is not allowed: it counts as waiting, so it must be shorter"
            f" than --queue-timeout, which is {config.queue_timeout:g}s"
        )
    if config.pipeline > 1 and config.request_delay:
        raise ConfigError(
            f"--request-delay: is not allowed with --pipeline {config.pipeline}: it is a rest between two requests"
        )
    for name in ("key_fields", "late_window"):
        if name in given and config.correlation != "key":
            raise ConfigError(f"{BY_NAME[name].flag}: is not allowed with --correlation order, which reads no field")
    reads_fields = config.correlation == "key" or config.answer_network_management or config.idle_check
    if "spec" in given and not reads_fields:
        raise ConfigError(
            "--spec: is not allowed with --correlation order, which reads no field, unless there is"
            " --answer-network-management or --idle-check"
        )
    # A request and its answer are of one kind: 0800 and 0810.
    kinds = [f"{mti[:2]}{int(mti[2]) // 2}" if mti else "" for mti, _ in config.key_fields]
    if len(set(kinds)) < len(kinds):
        raise ConfigError("--key-fields: is given twice for the same kind of message")
    if config.prefer_pipeline and config.pipeline == 1:
        raise ConfigError("--prefer-pipeline: is not allowed with --pipeline 1: a connection is full with one request")
    if config.upstream_max_age and config.upstream_max_age <= config.connect_delay:
        raise ConfigError(
            f"--upstream-max-age: '{config.upstream_max_age:g}s' is not allowed: it must be longer than"
            f" --connect-delay, which is {config.connect_delay:g}s"
        )
    if config.verbose and config.quiet:
        raise ConfigError("--quiet: is not allowed together with --verbose")
    return config
