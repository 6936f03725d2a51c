"""A file that lines are appended to: the log, the access log. Several processes append to one, and logrotate moves it.

Writing never waits: what the file does not take now is held, up to a limit, and written before anything else. So a disk
that is full, or a reader that has stopped, costs lines in the end and never the service.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any

from gmux.errors import StartError

#: Bytes that are held of lines that the file does not take; further lines are lost, and counted.
MAX_HELD = 1024 * 1024

#: Seconds until a loop writes again what is held. The time doubles while nothing is taken, so an idle gmux sleeps.
MIN_RETRY_INTERVAL = 0.01
MAX_RETRY_INTERVAL = 1.0

#: Nobody but the owner and the group: the names of clients are in it.
MODE = 0o640


class LogFile:
    """The file at `path`, or the descriptor `standard` (1, 2) of the process when that is empty or `-`.

    `what` names it for errors. `owner` are the user and the group that workers run as, -1 for the usual ones.
    `complain` is called with a line when the file cannot be opened again, once when it cannot be written, and when
    lines were lost.
    """

    def __init__(
        self, what: str, path: str, standard: int, owner: tuple[int, int], complain: Callable[[str], None]
    ) -> None:
        self.is_named = path not in ("", "-")
        # A service may change its folder.
        self._path = os.path.abspath(path) if self.is_named else ""
        self._name = f"the {what} {path}" if self.is_named else f"the {what}"
        self._standard = standard
        self._owner = owner
        self._complain = complain
        self._held = bytearray()
        self._lost = 0
        self._is_failing = self._is_full = False
        self._number = -1
        self._most = 0
        self._may_block = False
        self._sock: socket.socket | None = None
        self._loop: Any = None
        self._timer: Any = None
        self._retry_interval = MIN_RETRY_INTERVAL

    def open(self) -> None:
        """Raises StartError."""
        try:
            self._open()
        except OSError as error:
            raise StartError(f"cannot open {self._name}: {error.strerror}") from None

    def reopen(self) -> None:
        """Open the file again under its name; when that fails, the old one is written on."""
        try:
            self._open()
        except OSError as error:
            self._complain(f"cannot open {self._name}: {error.strerror}")
            self._is_failing = self._is_failing or self._number < 0

    def close(self) -> None:
        """Close it. Lines that it has not taken by now are counted as lost."""
        self._let_go()
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._lost += self._held.count(b"\n")
        self._held.clear()
        self._say_lost()

    def _let_go(self) -> None:
        if self._sock is not None:
            self._sock.detach()
            self._sock = None
        if self._number not in (-1, self._standard):
            os.close(self._number)
        self._number = -1

    def retry_in(self, loop: Any) -> None:
        """In a new worker: write what is held from timers of `loop`. What its parent holds is the parent's to write."""
        self._held.clear()
        self._lost = 0
        self._loop = loop

    def write(self, lines: bytes) -> None:
        """Append `lines`, which end in a newline; never waits, never raises."""
        if self._lost or (self._held and len(self._held) + len(lines) > MAX_HELD):
            # Once lines are lost, all further ones are, until there is room for many: the log has one gap and not many.
            self._lost += lines.count(b"\n")
            self._fail("nobody reads it")
        else:
            self._held += lines
        self.retry()

    def retry(self) -> None:
        """Write what is held, as far as the file takes it; never waits, never raises."""
        before = len(self._held)
        self._is_full = False
        try:
            while self._held:
                # Whole lines, so that those of several processes do not mix.
                end = self._held.rfind(b"\n", 0, self._most) + 1
                del self._held[: self._write(self._held[: end or self._most])]
        except BlockingIOError:
            self._is_full = True
        except OSError as error:
            self._fail(error.strerror or str(error))
        else:
            self._is_failing = False
        if len(self._held) <= MAX_HELD // 2:
            self._say_lost()
        if len(self._held) < before:
            self._retry_interval = MIN_RETRY_INTERVAL
        if self._held and self._loop is not None and self._timer is None:
            self._timer = self._loop.timer(self._retry_interval)
            self._timer.start(self._on_timer)

    def flush(self, seconds: float) -> None:
        """Write what is held, and wait up to `seconds` until the reader has taken it. Call it before `close`."""
        end = monotonic() + seconds
        self.retry()
        while self._is_full and (left := end - monotonic()) > 0:
            self._poll(left)
            self.retry()

    def _on_timer(self) -> None:
        self._timer.close()
        self._timer = None
        self._retry_interval = min(2 * self._retry_interval, MAX_RETRY_INTERVAL)
        self.retry()

    def _open(self) -> None:
        if not self.is_named:
            self._open_standard()
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        changes_owner = os.geteuid() == 0 and self._owner != (-1, -1)
        if changes_owner:
            # A worker's user could make its log a link to a file of root, and so become its owner.
            flags |= os.O_NOFOLLOW
        number = os.open(self._path, flags, MODE)
        try:
            if changes_owner and stat.S_ISREG(os.fstat(number).st_mode):
                os.fchown(number, *self._owner)
        except OSError:
            os.close(number)
            raise
        self._use(number)

    def _open_standard(self) -> None:
        """Find a way to write to the descriptor that does not wait.

        Other programs share it, and expect it to block, so its flags stay as they are.
        """
        if self._standard <= 2 and (sys.__stdout__, sys.__stderr__)[self._standard - 1] is None:
            # It was closed when the process began, and the next connection would get its number.
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self._standard)
        status = os.fstat(self._standard)
        if self._number not in (-1, self._standard) and os.path.samestat(os.fstat(self._number), status):
            return  # a worker that has become another user could not open it again
        if stat.S_ISREG(status.st_mode):
            # A file never makes its writer wait, and all who share this descriptor write at the end of the file.
            self._use(self._standard)
        elif stat.S_ISSOCK(status.st_mode):
            sock = socket.socket(fileno=os.dup(self._standard))
            self._use(sock.fileno())
            self._sock = sock
        else:
            # A pipe, a terminal, a device: opened again, it has flags of its own.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
            try:
                number = os.open(f"/proc/self/fd/{self._standard}", flags)
            except OSError:  # it is another user's
                number = self._standard
            self._use(number)

    def _use(self, number: int) -> None:
        self._let_go()
        self._number = number
        is_regular = stat.S_ISREG(os.fstat(number).st_mode)
        # A pipe or a socket takes so much in one piece or not at all, a file what it has room for.
        self._most = sys.maxsize if is_regular else select.PIPE_BUF
        self._may_block = number == self._standard and not is_regular

    def _write(self, data: bytearray) -> int:
        if self._sock is not None:
            return self._sock.send(data, socket.MSG_DONTWAIT)
        # Whether there is room is all that can be asked. When another process takes it meanwhile, this write waits.
        if self._may_block and not self._poll(0):
            raise BlockingIOError
        return os.write(self._number, data)

    def _poll(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self._number, select.POLLOUT)
        return bool(poller.poll(seconds * 1000))

    def _say_lost(self) -> None:
        lost, self._lost = self._lost, 0
        if lost:
            self._complain(f"{lost} lines for {self._name} are lost")

    def _fail(self, reason: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            self._complain(f"cannot write {self._name}: {reason}")
