"""The runtime folder: where the gmux processes of one user meet, and what keeps it and its files in place.

Temporary folders are cleaned: by systemd-tmpfiles, by other programs, by hand. A slot whose file is gone is no slot any
more, as the next process makes a new file of that name and locks that. So each process that uses the folder

- holds a shared lock on it, which systemd-tmpfiles respects (tmpfiles.d(5), "BSD file locks"),
- looks each second whether it, and all that is kept in it, is still there, and puts back what is not.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from gevent import get_hub

from gmux.errors import StartError
from gmux.logs import LOGGER

#: Seconds between two looks. For so long, and no longer, two processes may believe that they hold one slot.
LOOK_INTERVAL = 1.0

#: Seconds after which the time of a file is set again. Cleaners by age wait for hours; each second would wear out the
#: flash memory of a small machine.
TOUCH_INTERVAL = 60.0

#: Seconds for which the log does not repeat a warning.
WARN_INTERVAL = 60.0

HINT = "something removes files in the runtime folder: keep it from there, or choose another folder (--runtime-dir)"


def runtime_dir(path: str, uid: int, gid: int) -> Path:
    """The folder where processes that share budgets meet, which only their user can write to; made when missing.

    `path` is empty for the usual one. Raises StartError.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    of_root = Path("/run/gmux")
    if path:
        folder = Path(path).absolute()
    elif os.geteuid() == 0:
        folder = of_root
    elif base:
        folder = Path(base, "gmux")
    else:
        folder = Path(tempfile.gettempdir(), f"gmux-{os.geteuid()}")
    hint = "; XDG_RUNTIME_DIR names it" if base and os.geteuid() and not path else ""
    # Others may pass through it, to sockets of --listen that are there; what gmux puts there is for its user alone.
    _provide(folder, 0o711 if folder == of_root else 0o700, uid, gid, hint)
    return folder


def _provide(folder: Path, mode: int, uid: int, gid: int, hint: str = "") -> None:
    """Make the folder when it is missing, and make sure that only its user can write to it. Raises StartError."""
    try:
        try:
            folder.mkdir(mode=mode, parents=True)
        except FileExistsError:
            pass
        else:
            os.chown(folder, uid, gid)
        status = folder.lstat()
    except OSError as error:
        raise _unusable(folder, f"{error.strerror}{hint}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise _unusable(folder, f"File exists{hint}")
    if status.st_uid != uid:
        raise _unusable(folder, f"it belongs to user {status.st_uid}, not {uid}")
    if status.st_mode & 0o022:
        raise _unusable(folder, "others may write to it")


def _unusable(folder: Path, reason: str | None) -> StartError:
    return StartError(f"cannot use the runtime folder {folder}: {reason}")


class Folder:
    """The runtime folder as one process uses it. Opened before a fork, it is the child's once the parent closed it."""

    def __init__(self, path: Path) -> None:
        """Raises StartError."""
        self.path = path
        self._is_locked = False
        self._looks: list[Callable[[], None]] = []
        self._timer: Any = None
        self._warned: dict[str, float] = {}
        try:
            self._descriptor = _open(path)
        except OSError as error:
            raise _unusable(path, error.strerror) from None
        self._mode = os.fstat(self._descriptor).st_mode & 0o777
        self._lock()

    @property
    def at(self) -> Path:
        """A short name of it in this process: the name of a socket has a limit that `path` may come close to."""
        return Path(f"/proc/self/fd/{self._descriptor}")

    def mend(self) -> None:
        """Make the folder again, and open it, if it is gone or another is there. Raises StartError."""
        with suppress(OSError):
            if os.path.samestat(os.lstat(self.path), os.fstat(self._descriptor)):
                return
        # A folder of somebody else may be there by now, in a place where everybody can make one.
        _provide(self.path, self._mode, os.geteuid(), -1)
        try:
            descriptor = _open(self.path)
            # Its number stays, and so does `at`.
            os.dup2(descriptor, self._descriptor, inheritable=False)
        except OSError as error:
            raise _unusable(self.path, error.strerror) from None
        os.close(descriptor)
        self._is_locked = False
        self._lock()
        self.warn(f"the runtime folder {self.path} was removed, and is there again")

    def watch(self, look: Callable[[], None]) -> None:
        """Call `look` each second, after a look at the folder itself. It must neither switch greenlets nor raise."""
        self._looks.append(look)
        if self._timer is None:
            self._timer = get_hub().loop.timer(LOOK_INTERVAL, LOOK_INTERVAL)
            self._timer.start(self._look)

    def unwatch(self, look: Callable[[], None]) -> None:
        with suppress(ValueError):
            self._looks.remove(look)
        if not self._looks and self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def warn(self, message: str) -> None:
        """Log that something is wrong with the folder or a file in it, once in WARN_INTERVAL."""
        now = monotonic()
        self._warned = {text: end for text, end in self._warned.items() if end > now}
        if message not in self._warned:
            self._warned[message] = now + WARN_INTERVAL
            LOGGER.warning("%s; %s", message, HINT)

    def close(self) -> None:
        """Let go of it, also behind a fork: then the lock is the other process's."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _look(self) -> None:
        self._lock()
        try:
            self.mend()
        except StartError as error:
            self.warn(str(error))
            return
        for look in tuple(self._looks):
            look()

    def _lock(self) -> None:
        if not self._is_locked:
            # It fails while a cleaner is at work here; then the next look tries again.
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                self._is_locked = True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
