"""What systemd hands to a service and is told by it: listening sockets, readiness, signs of life.

The protocols are those of sd_listen_fds(3) and sd_notify(3). Without systemd, or with variables that make no sense,
nothing here does anything.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gunicorn import systemd

from gmux.logs import LOGGER


def activated() -> list[tuple[int, str]]:
    """The descriptors that were handed to this process, each with its name; the variables that tell are removed."""
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    # A process that is not the one meant has inherited the variables, but not the sockets.
    if _number(pid) != os.getpid():
        return []
    first = systemd.SD_LISTEN_FDS_START
    # No process has more descriptors than that, and a number that is garbage must not keep us busy.
    end = first + min(_number(count), 1024)
    given = names.split(":")
    return [(fd, given[fd - first] if fd - first < len(given) else "") for fd in range(first, end)]


def _number(text: str) -> int:
    return int(text) if re.fullmatch("[0-9]{1,15}", text, re.ASCII) else 0


def notify(*lines: str) -> None:
    systemd.sd_notify("\n".join(lines), LOGGER)


@contextmanager
def silence() -> Iterator[None]:
    """Whatever is told meanwhile does not reach systemd."""
    address = os.environ.pop("NOTIFY_SOCKET", None)
    try:
        yield
    finally:
        if address is not None:
            os.environ["NOTIFY_SOCKET"] = address


def notify_reloading() -> None:
    """`READY=1` tells the end of it. The time is how systemd knows which reload that was (Type=notify-reload)."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


class Watchdog:
    """The signs of life that systemd asks for with WatchdogSec=."""

    def __init__(self, *, is_upgrade: bool) -> None:
        pid = os.environ.get("WATCHDOG_PID", "")
        # After an upgrade the variable still names the old master, whose duty it was.
        is_meant = is_upgrade or not pid or _number(pid) == os.getpid()
        #: Seconds between two signs at most, half of what systemd waits; 0: it does not ask for any.
        self.interval = _number(os.environ.get("WATCHDOG_USEC", "")) / 2e6 if is_meant else 0.0

    def beat(self) -> None:
        if self.interval:
            notify("WATCHDOG=1")
