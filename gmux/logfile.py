"""A file that lines are appended to: the log, the access log. Several processes append to one, and logrotate moves it.

What the file does not take stays here, up to a limit, and goes first with the next write; so a disk that is full, or a
reader that has stopped, costs lines in the end and never the service.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable

from gmux.errors import StartError

#: Bytes that are held of lines that the file does not take; more of them are lost, and counted.
MAX_UNSENT = 1024 * 1024

#: Nobody but the owner and the group: the names of clients are in it.
MODE = 0o640


class LogFile:
    """The file at `path`, or the descriptor `standard` (1, 2) of the process when that is empty or `-`.

    `what` names it for errors. `owner` are the user and the group that workers run as, -1 for the usual ones.
    `complain` is called with a line when the file cannot be opened anew, once when it cannot be written, and when lines
    were lost.
    """

    def __init__(
        self, what: str, path: str, standard: int, owner: tuple[int, int], complain: Callable[[str], None]
    ) -> None:
        self.is_named = path not in ("", "-")
        # A service may change its folder.
        self._path = os.path.abspath(path) if self.is_named else ""
        self._name = f"the {what} {path}" if self.is_named else f"the {what}"
        self._owner = owner
        self._complain = complain
        self._unsent = bytearray()
        self._lost = 0
        self._is_failing = False
        self._number = -1
        self._use(-1 if self.is_named else standard)

    def open(self) -> None:
        """Raises StartError."""
        try:
            self._open()
        except OSError as error:
            raise StartError(f"cannot open {self._name}: {error.strerror}") from None

    def reopen(self) -> None:
        """Open the file anew under its name; when that fails, the old one is written on."""
        try:
            self._open()
        except OSError as error:
            self._complain(f"cannot open {self._name}: {error.strerror}")
            self._is_failing = self._is_failing or self._number < 0

    def close(self) -> None:
        if self.is_named and self._number >= 0:
            os.close(self._number)
            self._number = -1

    def _open(self) -> None:
        if not self.is_named:
            if (sys.__stdout__, sys.__stderr__)[self._number - 1] is None:
                # It was closed when the process began, and the next connection would get its number.
                os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self._number)
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
        self.close()
        self._use(number)

    def _use(self, number: int) -> None:
        self._number = number
        try:
            self._is_regular = stat.S_ISREG(os.fstat(number).st_mode)
        except OSError:
            self._is_regular = True  # closed: the first write says so
        self._poller = select.poll()
        if not self._is_regular:
            self._poller.register(number, select.POLLOUT)

    @property
    def is_behind(self) -> bool:
        """Whether lines are held that the file has not taken."""
        return bool(self._unsent)

    def write(self, lines: bytes, patience: float) -> None:
        """Append `lines`, which end in a newline; never raises. `patience`: seconds that a reader may make wait.

        One that makes wait for longer has its lines held, and no further wait until it has taken them.
        """
        if len(self._unsent) + len(lines) <= MAX_UNSENT or not self._unsent:
            self._unsent += lines
        else:
            self._lost += lines.count(b"\n")
            self._fail("nobody reads it")
        try:
            while self._unsent:
                del self._unsent[: self._put(0 if self._is_failing else patience)]
        except BlockingIOError:
            if patience:
                self._fail("nobody reads it")
        except OSError as error:
            self._fail(error.strerror or str(error))
        else:
            self._is_failing = False
            if self._lost:
                lost, self._lost = self._lost, 0
                self._complain(f"{lost} lines for {self._name} are lost")

    def _put(self, patience: float) -> int:
        """Write what is held; the bytes taken. Raises OSError."""
        if self._is_regular:
            # One write for a line, so that those of several processes do not mix.
            return os.write(self._number, self._unsent)
        # The descriptor is shared with other programs, so it cannot be made one that does not block. A pipe or a socket
        # that is ready has room for so much.
        if not self._poller.poll(patience * 1000):
            raise BlockingIOError
        return os.write(self._number, self._unsent[: select.PIPE_BUF])

    def _fail(self, reason: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            self._complain(f"cannot write {self._name}: {reason}")
