"""What the commands `examples/*_server.py` share: their options, their signals, their exit codes.

Exit codes are those of gmux: 2 for wrong arguments, 1 when the target cannot start, each with one line; 0 on a signal.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn, TypeVar

import docopt
import gevent
from gevent.event import Event

from gmux import net
from gmux.errors import StartError
from gmux.kinds import parse_seconds
from gmux.samples.target import Target

T = TypeVar("T")

HOST = "127.0.0.1"


def parse(doc: str) -> docopt.ParsedOptions:
    """The words of the command line by the usage in `doc`; exits with 2 and one line when they do not fit it."""
    try:
        return docopt.docopt(doc)
    except docopt.DocoptExit as error:
        reason = str(error).partition("\n")[0]
        # docopt names the words it cannot place by the reprs of its own classes.
        if words := re.findall("'(.*?)'", reason):
            reason = f"{words[0]} is unknown or given twice"
        fail(2, f"{reason}; see --help")


def run(target_class: type[Target], words: docopt.ParsedOptions) -> None:
    """Serve, with --port, --max-connections and --delay of `words`, until INT or TERM; switches greenlets.

    Prints a line about the target and one about each connection. Exits with 2 for a bad value, with 1 when the port
    cannot be had.
    """
    port = value(words, "--port", partial(_parse_whole, 0, 65535), "a port from 0 to 65535")
    max_connections = value(words, "--max-connections", partial(_parse_whole, 1, 9999), "a number from 1 to 9999")
    delay = value(words, "--delay", parse_seconds, "a time such as 500ms or 10s")
    try:
        target = target_class((HOST, port), max_connections, delay, report=_print)
    except StartError as error:
        fail(1, str(error))
    stopping = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stopping.set)
    target.start()
    where = net.format_address(target.address)
    _print(f"{target.protocol} target listening on {where}, connections: {max_connections} at most")
    stopping.wait()


def value(words: docopt.ParsedOptions, name: str, read: Callable[[str], T], allowed: str, default: str = "") -> T:
    """What `read` makes of the word `name`, or of `default` when it is not given; exits with 2 when `read` refuses."""
    text: str = words[name] or default
    try:
        return read(text)
    except (ValueError, KeyError):
        fail(2, f"{name}: {text!r} is not allowed: {allowed}")


def fail(code: int, reason: str) -> NoReturn:
    """End the process with one line on standard error."""
    print(f"{sys.argv[0].rpartition('/')[2]}: {reason}", file=sys.stderr)
    sys.exit(code)


def _parse_whole(least: int, most: int, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ValueError
    return int(text)


def _print(line: str) -> None:
    print(line, flush=True)
