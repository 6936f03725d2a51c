"""What somebody gave for the settings: flags before variables of the environment before a file.

    [service]             settings of the service
    [defaults]            settings of all routes
    [[route]]             a route: its name, and settings of its own

A route has what its protocol can use of [defaults], and before that what its [[route]] says; flags and variables go to
every route. Without any [[route]] there is one route. Names of files are made absolute here, so that a reload means the
same files wherever the process has gone since.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from gmux import config, toml_lines
from gmux.config import Given, GivenRoute, ServiceConfig, Texts
from gmux.errors import ConfigError, ConfigErrors
from gmux.kinds import ACCESS_LOG, FILE, FLAG, FOLDER, LOG_FILE, MESSAGE_FILE, MODE, NAME, PATH, SPEC, Kind
from gmux.settings import BY_NAME, OF_ROUTES, OF_SERVICE, SETTINGS, Setting

#: Far above any real one: what was named by mistake, a disk say, must not fill the memory.
MAX_FILE_BYTES = 1 << 20

PREFIX = "GMUX_"

#: So close is an unknown variable to a known one that is meant: for a service called gmux Kubernetes sets many that no
#: one means, such as GMUX_SERVICE_HOST.
CLOSE_VARIABLE = 0.8

ROUTE_NAME = Setting("name", NAME, "", "name of the route, for logs and errors", "Route")

#: The tables of a file, and the settings in each by their keys.
TABLES: dict[str, dict[str, Setting]] = {
    "service": {s.key: s for s in OF_SERVICE if s.name != "config"},
    "defaults": {s.key: s for s in OF_ROUTES if s.name != "listen"},
    "route": {s.key: s for s in (ROUTE_NAME, *OF_ROUTES)},
}
HEADERS = {"service": "[service]", "defaults": "[defaults]", "route": "[[route]]"}
_PARTS = "a file has [service], [defaults] and any number of [[route]]"
_OWNERS = {"service": "the service", "defaults": "routes", "route": "routes"}

#: The kinds whose values are names of files, and what else these may be.
_NO_FILES: dict[Kind, tuple[str, ...]] = {
    FILE: (),
    LOG_FILE: ("-",),
    ACCESS_LOG: ("-",),
    FOLDER: (),
    PATH: (),
    MESSAGE_FILE: (),
    SPEC: ("auto", "ascii", "binary"),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, what it was made of, and what is allowed in it but can hardly be meant."""

    config: ServiceConfig
    texts: Texts
    routes: tuple[GivenRoute, ...]
    warnings: tuple[str, ...]


def load(flags: Texts, environ: Mapping[str, str], folder: str = "") -> Loaded:
    """The configuration, read and verified. Relative names of files begin in `folder`. Raises ConfigErrors."""
    named = {**_read_environment(environ), **flags}
    reader = _Reader(os.path.abspath(folder))
    file = reader.open(named["config"]) if "config" in named else _File()
    reader.base = os.path.join(reader.folder, str(named["chdir"].text) if "chdir" in named else file.chdir)
    tables = reader.read_tables(file)
    routes, unused = _read_routes(reader, file, tables, named)
    texts: dict[str, Given] = {}
    for table in tables["service"]:
        texts |= reader.read_settings(file, "service", table)
    texts |= reader.take(OF_SERVICE, named)
    problems = reader.problems
    try:
        settings = config.read(texts, routes)
        config.verify(settings, routes)
    except ConfigErrors as error:
        problems += error.problems
    if problems:
        # A flag may not fit each of the routes: it is told of once.
        raise ConfigErrors(sorted(dict.fromkeys(problems), key=file.line_of))
    no_effect = (f"{given.where}: has no effect: no route has a protocol that it is for" for given in unused)
    return Loaded(settings, texts, tuple(routes), (*_warn_of_environment(environ), *no_effect))


def _read_routes(
    reader: _Reader, file: _File, tables: Mapping[str, list[dict[str, Any]]], named: Texts
) -> tuple[list[GivenRoute], list[Given]]:
    """The routes of which all is right, and what [defaults] has for none of them.

    Of the others it is not told how they fit together: what is wrong may be what is missing.
    """
    defaults: dict[str, Given] = {}
    for table in tables["defaults"]:
        defaults |= reader.read_settings(file, "defaults", table)
    of_all = reader.take(OF_ROUTES, named)
    count = len(tables["route"])
    if "listen" in of_all and count > 1:
        given = of_all.pop("listen")
        reader.problems.append(
            f"{given.where}: {given.text!r} is not allowed with the {count} routes of {file.name}: no two can listen at"
            " one address, so it belongs in each [[route]]"
        )
    is_right = not reader.problems
    if not count:
        return [GivenRoute(defaults | of_all)] if is_right else [], []
    routes = []
    unused = dict(defaults)
    for index, table in enumerate(tables["route"]):
        known = len(reader.problems)
        texts = _fit_defaults(defaults, reader.read_settings(file, "route", table, index) | of_all)
        for name in texts:
            unused.pop(name, None)
        if is_right and len(reader.problems) == known:
            name = str(texts["name"].text) if "name" in texts else ""
            routes.append(GivenRoute(texts, name, file.place("route", index)))
    return routes, list(unused.values())


@dataclass(frozen=True, slots=True)
class _File:
    """A file as tomllib has it, and the lines of its keys."""

    name: str = ""
    document: dict[str, Any] = field(default_factory=dict)
    lines: dict[toml_lines.Path, int] = field(default_factory=dict)

    @property
    def chdir(self) -> str:
        """What it says of the folder to run in, right or wrong: all other names of files depend on it."""
        service = self.document.get("service")
        chdir = service.get("chdir") if isinstance(service, dict) else None
        return chdir if isinstance(chdir, str) else ""

    def place(self, *path: str | int) -> str:
        return f"{self.name}:{self.lines[path]}"

    def line_of(self, problem: str) -> int:
        match = re.match(re.escape(self.name) + r":([0-9]+): ", problem)
        return int(match[1]) if match else 0


class _Reader:
    """One pass over all that was given; what is wrong with it gathers in `problems`."""

    def __init__(self, folder: str) -> None:
        self.problems: list[str] = []
        self.folder = folder
        #: Where the names of files begin that are in the settings.
        self.base = folder

    def open(self, given: Given) -> _File:
        """The file, or an empty one when there is something wrong with it."""
        name = str(given.text)
        try:
            path = self._take_text(BY_NAME["config"], name, given.where).text
            return _parse(name, _read_text(name, str(path)))
        except ConfigErrors as error:
            self.problems += error.problems
        except ConfigError as error:
            self.problems.append(f"{given.where}: {error}")
        return _File()

    def read_tables(self, file: _File) -> dict[str, list[dict[str, Any]]]:
        """The tables of each name that have the form they must have."""
        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        for name, value in file.document.items():
            found = value if isinstance(value, list) else [value]
            are_tables = all(isinstance(table, dict) for table in found)
            if name not in TABLES:
                shown = f"[{_show(name)}]" if found and are_tables else _show(name)
                self.problems.append(f"{file.place(name)}: {shown}: {_explain_unknown(name)}")
            elif are_tables and isinstance(value, list) == (name == "route"):
                tables[name] = found
            else:
                self.problems.append(f"{file.place(name)}: {name}: is not allowed in this form: write {HEADERS[name]}")
        return tables

    def read_settings(self, file: _File, name: str, table: dict[str, Any], *index: int) -> dict[str, Given]:
        """What is right in a table."""
        texts = {}
        for key, value in table.items():
            where = f"{file.place(name, *index, key)}: {_show(key)}"
            try:
                if key not in TABLES[name]:
                    raise ConfigError(_explain_unknown(key, name))
                setting = TABLES[name][key]
                texts[setting.name] = self._take_text(setting, _write_text(setting, value), where)
            except ConfigError as error:
                self.problems.append(f"{where}: {error}")
        return texts

    def take(self, settings: Sequence[Setting], named: Texts) -> dict[str, Given]:
        """What is right of these settings among flags and variables."""
        texts = {}
        for setting in settings:
            if setting.name in named:
                given = named[setting.name]
                try:
                    texts[setting.name] = self._take_text(setting, given.text, given.where)
                except ConfigError as error:
                    self.problems.append(f"{given.where}: {error}")
        return texts

    def _take_text(self, setting: Setting, text: str | list[str], where: str) -> Given:
        if isinstance(text, str) and text and text not in _NO_FILES.get(setting.kind, (text,)):
            text = os.path.join(self.folder if setting.name in ("config", "chdir") else self.base, text)
        setting.parse(text)
        return Given(text, where)


# The environment.


def _read_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    """An empty variable is none: that is how most tools unset one. Of a setting that repeats, each line is a value."""
    given = {}
    for setting in SETTINGS:
        if text := environ.get(setting.variable):
            lines = [line for line in text.split("\n") if line]
            given[setting.name] = Given(lines if setting.kind.repeats else text, setting.variable)
    return given


def _warn_of_environment(environ: Mapping[str, str]) -> Iterator[str]:
    known = {s.variable.removeprefix(PREFIX): s.variable for s in SETTINGS}
    for name in sorted(environ):
        word = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and environ[name] and word not in known:
            for close in get_close_matches(word, known, 1, CLOSE_VARIABLE):
                yield f"{_show(name)} is not known: did you mean {known[close]}?"


# The file.


def _read_text(name: str, path: str) -> str:
    """Raises ConfigError, for behind what named the file, and ConfigErrors with the place in it."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name!r} cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{name!r} is not allowed: a file of at most {MAX_FILE_BYTES >> 20} MiB")
    try:
        # Some editors begin a file with a mark of its encoding.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigErrors([f"{name}:{line}: byte 0x{data[error.start]:02x} is not allowed: a file of UTF-8"]) from None


def _parse(name: str, text: str) -> _File:
    """Raises ConfigErrors."""
    try:
        return _File(name, tomllib.loads(text), toml_lines.find_lines(text))
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).rpartition(" (at ")
        at = re.match(r"line ([0-9]+), column ([0-9]+)", place)
        line, column = (at[1], f", at column {at[2]}") if at else (text.count("\n", 0, -1) + 1, ", at the end")
        problem = f"{name}:{line}: this is not TOML: {message}{column}"
    except RecursionError:
        problem = f"{name}: this is nested too deeply"
    except ValueError:
        # Python converts no decimal number beyond some thousand digits, and tomllib does not say where.
        problem = f"{name}: a number in it has too many digits"
    raise ConfigErrors([problem])


def _write_text(setting: Setting, value: Any) -> str | list[str]:
    """A value of TOML as the text of a flag. Raises ConfigError."""
    if not setting.kind.repeats:
        return _write_one(setting, value, setting.allowed)
    items = value if isinstance(value, list) else [value]
    return [_write_one(setting, item, f"{setting.allowed}; or an array of these") for item in items]


def _write_one(setting: Setting, value: Any, allowed: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        text = str(value).lower()
        if setting.kind is FLAG:
            return text
    elif isinstance(value, int | float):
        try:
            text = str(value)
        except ValueError:
            raise ConfigError(f"a number with so many digits is not allowed: {allowed}") from None
        if setting.kind is not MODE:
            return text
        # 0o660 would come here as 432, which is another mode.
        text += " without quotes"
    else:
        text = "an array" if isinstance(value, list) else "a table" if isinstance(value, dict) else str(value)
    raise ConfigError(f"{text} is not allowed: {allowed}")


def _fit_defaults(defaults: Texts, own: Texts) -> dict[str, Given]:
    """What a route says itself, and what its protocol can use of [defaults]."""
    texts = {**defaults, **own}
    protocol = texts["protocol"].text if "protocol" in texts else BY_NAME["protocol"].default_text
    return {n: t for n, t in texts.items() if n in own or protocol in (BY_NAME[n].protocols or (protocol,))}


def _explain_unknown(key: str, table: str = "") -> str:
    """Why a key or table is not allowed in a table, or at the top of the file."""
    if key == "config":
        return "is not allowed: a file cannot name another"
    if key == "listen" and table == "defaults":
        return "is not allowed in [defaults], as no two routes can have the same: it belongs in [[route]]"
    if homes := [name for name in TABLES if key in TABLES[name]]:
        owners = " and of ".join(dict.fromkeys(_OWNERS[name] for name in homes))
        return f"is a setting of {owners}: it belongs in {' or '.join(HEADERS[name] for name in homes)}"
    everywhere = {**TABLES["service"], **TABLES["route"]}
    if close := get_close_matches(key, TABLES.get(table, HEADERS), 1) or get_close_matches(key, everywhere, 1):
        return f"is not known: did you mean {close[0] if table else HEADERS.get(close[0], close[0])}?"
    return "is not known: gmux server --help lists the settings" if table else f"is not known: {_PARTS}"


def _show(word: str) -> str:
    return word if word.isprintable() and word else repr(word)
