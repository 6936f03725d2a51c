"""The command line: words and flags to settings, errors to one line and an exit code (2 for usage, 1 for the rest)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import groupby

import docopt
from setproctitle import getproctitle

from gmux import __version__, effective, logs, sources
from gmux.codecs import registry
from gmux.config import Given, ServiceConfig
from gmux.errors import ConfigError, ConfigErrors, GmuxError, StartError
from gmux.settings import BY_FLAG, SETTINGS, Setting
from gmux.sources import Loaded

USAGE = """gmux: many clients share a few TCP connections to a target.

Usage:
  gmux server [options]
  gmux check [--print] [options]
  gmux list
  gmux version
  gmux --help | --version

Commands:
  server   serve routes: listen, frame messages, share the pool of connections to each target
  check    tell what is wrong with the options, the environment and the file of gmux server
  list     the protocols that gmux can frame
  version  the version of gmux
"""

#: Long names that tcp-multiplexer has for settings of ours.
ALIASES = {
    "--applicationProtocol": "--protocol",
    "--targetServer": "--target",
    "--delay": "--connect-delay",
    "--retryDelay": "--retry-delay",
}

PRINT = "--print"

#: A problem of a flag or a variable, as it begins; the others are of a file.
OF_COMMAND = re.compile(r"(--[a-z-]+|GMUX_[A-Z_]+): ")

#: Variables that gunicorn would take for its own while it is loaded.
FOREIGN_VARIABLES = ("GUNICORN_CMD_ARGS", "WEB_CONCURRENCY")


def main(argv: list[str] | None = None) -> None:
    """Run `gmux` and exit the process."""
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except ConfigErrors as error:
        _fail(2 if all(map(OF_COMMAND.match, error.problems)) else 1, *error.problems)
    except ConfigError as error:
        _fail(2, str(error))
    except GmuxError as error:
        _fail(1, str(error))


def _print(text: str) -> None:
    """Print to a standard output that may be gone or full, or know fewer characters. Raises StartError."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError as error:
        unknown = error.object[error.start]
        reason = f"{unknown!a} is not in its encoding, {error.encoding}"
        raise StartError(f"cannot write to standard output: {reason}") from None
    except OSError as error:
        # Python would try once more at its end, and say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StartError(f"cannot write to standard output: {error.strerror}") from None


def _fail(code: int, *messages: str) -> None:
    with suppress(OSError):  # nobody reads it: the code tells
        for message in messages:
            print(f"gmux: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _run(argv: list[str]) -> None:
    argv = [_alias(word) for word in argv]
    if "--help" in argv or "-h" in argv:
        _print(help_text() if {"server", "check"} & set(argv) else USAGE)
        return
    _check(argv)
    words = docopt.docopt(help_text(), argv, default_help=False)
    if words["list"]:
        _list()
    elif words["server"]:
        _server(words)
    elif words["check"]:
        _check_configuration(words)
    else:
        _print(f"gmux {__version__}")


def _alias(word: str) -> str:
    name, equals, value = word.partition("=")
    return ALIASES.get(name, name) + equals + value


def _list() -> None:
    names = "\n".join(f"* {name}" for name in registry.names())
    _print(f"{names}\n\nusage for example: gmux server -p echo")


def _server(words: docopt.ParsedOptions) -> None:
    flags, folder = _given(words), _folder()

    def reload() -> ServiceConfig:
        loaded = sources.load(flags, os.environ, folder)
        for warning in loaded.warnings:
            logs.LOGGER.warning("%s", warning)
        return loaded.config

    loaded = sources.load(flags, os.environ, folder)
    _warn(loaded)
    # It finds the place of the title beside the environment as the process was started with it.
    getproctitle()
    for name in FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    # gevent and gunicorn are loaded for the server alone: the other commands answer at once.
    from gmux import app

    app.serve(loaded.config, reload)


def _warn(loaded: Loaded) -> None:
    for warning in loaded.warnings:
        print(f"gmux: warning: {warning}", file=sys.stderr)


def _check_configuration(words: docopt.ParsedOptions) -> None:
    try:
        loaded = sources.load(_given(words), os.environ, _folder())
    except ConfigErrors as error:
        _fail(1, *error.problems)
    _warn(loaded)
    if words[PRINT]:
        _print(effective.render(loaded))
    else:
        number = len(loaded.routes)
        _print(f"the configuration is valid: {number} {'route' if number == 1 else 'routes'}")


def _given(words: docopt.ParsedOptions) -> dict[str, Given]:
    # An empty value is a value, and a wrong one: None and False alone mean that the flag is not there.
    return {s.name: Given(_text(s, words[s.flag]), s.flag) for s in SETTINGS if words[s.flag] not in (None, False, [])}


def _folder() -> str:
    """Where relative names of files begin."""
    try:
        return os.getcwd()
    except OSError:
        return "/"  # it was removed, and nothing is in it


def _text(setting: Setting, word: str | bool | list[str]) -> str | list[str]:
    if isinstance(word, bool):
        return "false" if setting.is_on else "true"
    return word


def help_text() -> str:
    """The usage, and each setting by group; docopt reads the flags from it."""
    repeating = "".join(f"[{s.flag} {s.kind.metavar}]... " for s in SETTINGS if s.kind.repeats)
    lines = [USAGE.replace("[options]", repeating + "[options]"), "Options of gmux server and gmux check:"]
    for group, settings in groupby(SETTINGS, lambda s: s.group):
        lines.append(f"  {group}")
        lines.extend(_help_lines(setting) for setting in settings)
    lines.append("  Other")
    lines.append("    --print     of gmux check: print all settings as a file, each with where it came from")
    lines.append("    -h, --help  show this help and exit")
    lines.append("    --version   show the version and exit")
    return "\n".join(lines)


def _help_lines(setting: Setting) -> str:
    names = ", ".join(filter(None, (setting.short, setting.flag)))
    value = f" {setting.kind.metavar}" if setting.kind.metavar else ""
    default = f" (default {setting.default_text})" if value and setting.default_text else ""
    return f"    {names + value:31}  {setting.help}{default}"


def _check(argv: list[str]) -> None:
    """Raises ConfigError with one line that names the first word which is wrong.

    docopt answers a mistake with the whole usage, and takes any beginning of a flag for the flag: a script that says
    `--queue` would change its meaning with the next version.
    """
    commands = ("server", "check", "list", "version")
    shorts = {s.short: s for s in SETTINGS if s.short}
    command = ""
    seen: set[str] = set()
    words = iter(argv)
    for word in words:
        flag = word.partition("=")[0]
        setting = BY_FLAG.get(flag) or shorts.get(word[:2])
        if setting is not None:
            if setting.flag in seen and not setting.kind.repeats:
                raise ConfigError(f"{setting.flag} is given twice")
            seen.add(setting.flag)
            _check_value(setting, word, words)
        elif flag == PRINT:
            if word != PRINT or PRINT in seen:
                raise ConfigError(f"{PRINT} {'is given twice' if word == PRINT else 'takes no value'}")
            seen.add(PRINT)
        elif word.startswith("-") and word != "--version":
            shown = flag if flag.isprintable() else repr(flag)
            raise ConfigError(f"unknown option {shown}{_suggest(flag, [*BY_FLAG, PRINT])}; see gmux server --help")
        elif word in (*commands, "--version") and not command:
            command = word
        else:
            suggestion = "" if command else _suggest(word, commands)
            raise ConfigError(f"unexpected word {word!r}{suggestion}; see gmux --help")
    if not command:
        raise ConfigError("a command is missing: server, check, list or version; see gmux --help")
    if command == "server":
        seen &= {PRINT}
    if seen and command != "check":
        raise ConfigError(f"{min(seen)} is not for gmux {command}; see gmux --help")


def _check_value(setting: Setting, word: str, words: Iterator[str]) -> None:
    """A flag that takes a value has one, glued on or as the next word; one that takes none has none."""
    is_long = word.startswith("--")
    glued = word.partition("=")[2] if is_long else word[2:]
    if not setting.kind.metavar:
        if glued or "=" in word:
            raise ConfigError(f"{setting.flag} takes no value")
    elif not glued and not (is_long and "=" in word) and next(words, None) is None:
        raise ConfigError(f"{setting.flag} needs a value: {setting.allowed}")


def _suggest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
