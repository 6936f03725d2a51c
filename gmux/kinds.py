"""Kinds of values: how the text of a setting becomes its value, and what is allowed."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

#: Host and port, or the path of a Unix socket.
Address = tuple[str, int] | str

#: Bytes of the path of a Unix socket, without the zero at its end (unix(7)).
MAX_UNIX_PATH = 107

#: What chown(2) takes for "as it is", so it is no user and no group.
NO_ID = 0xFFFFFFFF

EMBEDDED = "embedded"

_UNITS_OF_TIME = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_UNITS_OF_SIZE = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
MAX_MESSAGE_FILE = 64 * 1024
MAX_SPEC_FILE = 1024 * 1024
#: With less, hardly a client would find room.
LEAST_MEMORY = 64 * 1024
_MAX_SECONDS = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value: how text becomes it, and what the help and the errors call it.

    A setting whose kind `repeats` may be given many times; its value is a tuple. `empty` is the value of one that is
    not given and has no default.
    """

    metavar: str
    allowed: str
    parse: Callable[[str], Any]
    repeats: bool = False
    empty: Any = ""


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


def parse_size_or_none(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([kmg]?)(?:i?b)?", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError
    return int(match[1]) * _UNITS_OF_SIZE[match[2].lower()]


def parse_size(text: str) -> int:
    return parse_size_or_none(text) or _refuse_zero()


def parse_memory(text: str) -> int:
    size = parse_size(text)
    if size < LEAST_MEMORY:
        raise ValueError
    return size


def count(least: int, most: int) -> Kind:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or not least <= int(text) <= most:
            raise ValueError
        return int(text)

    return Kind("N", f"a whole number from {least} to {most}", parse)


def choice(metavar: str, *values: str) -> Kind:
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


def _parse_unix(text: str) -> str | None:
    """The path of a Unix socket; None: it is none. Absolute, as a daemon has another folder than its operator."""
    scheme, _, path = text.partition(":")
    if scheme != "unix":
        return None
    if not path.startswith("/") or path.endswith("/") or "\0" in path or len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise ValueError
    return path


def parse_listen(text: str) -> Address:
    """A bare port is all addresses, as in tcp-multiplexer."""
    return _parse_unix(text) or (_split_address(text) if ":" in text else ("", _parse_port(text)))


def parse_target(text: str) -> Address | None:
    """None is the embedded target."""
    if text == EMBEDDED:
        return None
    if path := _parse_unix(text):
        return path
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


def _read_file(text: str, most: int) -> bytes:
    """A regular file of 1 to `most` bytes; a device or a pipe might have no end."""
    try:
        path = Path(text)
        content = path.read_bytes() if path.is_file() and path.stat().st_size <= most else b""
    except OSError:
        raise ValueError from None
    if not content:
        raise ValueError
    return content


def parse_spec(text: str) -> str | dict[str, dict[str, Any]]:
    if text in ("auto", "ascii", "binary"):
        return text
    try:
        spec = json.loads(_read_file(text, MAX_SPEC_FILE))
    except RecursionError:
        raise ValueError from None
    if not isinstance(spec, dict):
        raise ValueError
    return spec


def parse_message_file(text: str) -> bytes:
    return _read_file(text, MAX_MESSAGE_FILE)


def parse_key_fields(text: str) -> tuple[str, tuple[int, ...]]:
    """A message type, or empty for all others, and its key fields."""
    match = re.fullmatch(r"(?:([0-9]{4}):)?([0-9]{1,3}(?:,[0-9]{1,3})*)", text, re.ASCII)
    if match is None:
        raise ValueError
    fields = tuple(sorted(int(number) for number in match[2].split(",")))
    if fields[0] < 2 or fields[-1] > 128 or len(set(fields)) < len(fields):
        raise ValueError
    return match[1] or "", fields


def _parse_octal(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{1,3}", text, re.ASCII):
        raise ValueError
    return int(text, 8)


def _parse_id(text: str, find: Callable[[str], int]) -> int:
    try:
        number = int(text) if re.fullmatch("[0-9]{1,10}", text, re.ASCII) else find(text)
    except KeyError:
        raise ValueError from None
    if number >= NO_ID:
        raise ValueError
    return number


def _parse_user(text: str) -> int:
    return _parse_id(text, lambda name: pwd.getpwnam(name).pw_uid)


def _parse_group(text: str) -> int:
    return _parse_id(text, lambda name: grp.getgrnam(name).gr_gid)


def parse_owner(text: str) -> tuple[int, int]:
    """User and group; -1: as it is."""
    user, colon, group = text.partition(":")
    if not (group if colon else user):
        raise ValueError
    return _parse_user(user) if user else -1, _parse_group(group) if group else -1


def _parse_path(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError
    return text


def _parse_folder(text: str) -> str:
    try:
        if not Path(_parse_path(text)).is_dir():
            raise ValueError
    except OSError:
        raise ValueError from None
    return text


def parse_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise ValueError
    return text


def parse_worker_timeout(text: str) -> int:
    """Whole seconds, as the arbiter counts."""
    seconds = parse_seconds(text)
    if seconds and (seconds < 1 or seconds != int(seconds)):
        raise ValueError
    return int(seconds)


def _refuse_zero() -> NoReturn:
    raise ValueError


SECONDS = Kind("TIME", "a time such as 500ms, 10s, 5m, or 0 for no limit", parse_seconds)
DELAY = Kind("TIME", "a time such as 500ms, 10s, 5m, or 0 for none", parse_seconds)
POSITIVE_SECONDS = Kind("TIME", "a time above 0 such as 500ms, 10s, 5m", lambda t: parse_seconds(t) or _refuse_zero())
SPIN = Kind("TIME", "a time such as 50us or 1ms, at most 1s, or 0 for none", parse_spin)
SIZE = Kind("SIZE", "a size in bytes such as 4096, 64k, 16M, 1G", parse_size)
SIZE_OR_NONE = Kind("SIZE", "a size in bytes such as 4096, 64k, 16M, 1G, or 0 for none", parse_size_or_none)
MEMORY = Kind("SIZE", "a size in bytes of at least 64k, such as 16M, 1G", parse_memory)
LISTEN = Kind("ADDR", "PORT, HOST:PORT or [IPV6]:PORT, with a PORT from 0 to 65535, or unix:/PATH", parse_listen)
TARGET = Kind("ADDR", "HOST:PORT or [IPV6]:PORT, without http://, unix:/PATH, or embedded", parse_target)
CORRELATION = choice("MODE", "auto", "order", "key")
UNSOLICITED = choice("MODE", "auto", "close", "drop", "broadcast")
MESSAGE_FILE = Kind("FILE", "a file that can be read, of 1 byte to 64 KiB", parse_message_file, empty=b"")
SPEC = Kind("SPEC", "auto, ascii, binary, or a file of JSON in the form of pyiso8583's specs", parse_spec)
KEY_FIELDS = Kind(
    "FIELDS", "numbers from 2 to 128 such as 11,41, or for one type 0800:7,11", parse_key_fields, True, ()
)
FORWARDED = choice("FORM", "off", "x-forwarded", "forwarded")
FIELD = Kind("FIELD", "NAME: VALUE, or NAME: to remove the field", parse_field, True, ())
HOST = Kind("HOST", "HOST or HOST:PORT", parse_host)
FLAG = Kind("", "true or false", lambda text: choice("", "true", "false").parse(text) == "true")
MODE = Kind("MODE", "an octal mode such as 0660", _parse_octal, empty=None)
OWNER = Kind("OWNER", "USER, USER:GROUP or :GROUP of this machine, by name or number", parse_owner, empty=None)
USER = Kind("USER", "a user of this machine, by name or number", _parse_user, empty=None)
GROUP = Kind("GROUP", "a group of this machine, by name or number", _parse_group, empty=None)
FILE = Kind("FILE", "the name of a file", _parse_path)
LOG_FILE = Kind("FILE", "the name of a file, or - for standard error", _parse_path)
ACCESS_LOG = Kind("FILE", "the name of a file, or - for standard output", _parse_path)
FOLDER = Kind("DIR", "a folder that is there", _parse_folder)
PATH = Kind("DIR", "the name of a folder", _parse_path)
NAME = Kind("NAME", "1 to 64 letters, digits, dots, dashes and underscores", parse_name)
WORKER_TIMEOUT = Kind("TIME", "a time in whole seconds such as 30s, 5m, or 0 for no limit", parse_worker_timeout)
LEVEL = choice("LEVEL", "debug", "info", "warning", "error")
