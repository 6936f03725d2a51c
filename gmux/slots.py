"""Permissions to own one upstream connection, shared by all gmux processes of a machine (invariant 1).

A slot is an exclusive `flock` on a file: there are `pool-size` files for a target. The kernel gives a lock back
whatever becomes of its process, together with the sockets: a crash, a kill or a reload never leaves a slot behind
and never lets a target see one connection too many. The file holds the process that took it, for the log, and is
removed with the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from time import monotonic

import gevent

from gmux.errors import ConnectError, ConnectTimeout, StartError

#: Seconds between two tries for a slot that another process holds; the gap in service after it lets go.
RETRY_INTERVAL = 0.02


def runtime_dir() -> Path:
    """A folder that only this user can write, made when it is missing. Raises StartError."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0:
        path = Path("/run/gmux")
    elif base:
        path = Path(base, "gmux")
    else:
        path = Path(tempfile.gettempdir(), f"gmux-{os.geteuid()}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        hint = "; XDG_RUNTIME_DIR names it" if base and os.geteuid() else ""
        raise StartError(f"cannot use the runtime folder {path}: {error.strerror}{hint}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StartError(f"cannot use the runtime folder {path}: others may write to it")
    return path


class FileSlot:
    """A slot that is held; `release` gives it back."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def release(self) -> None:
        # While the lock is held nobody else's slot can be behind the name; who has the file open meets `_is_at`.
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)


class OwnSlots:
    """For a target that no other process knows: the pool's own count is enough. It is its own slot, too."""

    def acquire(self, seconds: float) -> OwnSlots:
        return self

    def release(self) -> None:
        pass


class FileSlots:
    """The slots of one target on this machine."""

    def __init__(self, folder: Path, target: str, size: int, log: logging.Logger) -> None:
        name = hashlib.sha256(target.encode()).hexdigest()[:16]
        self._paths = [folder / f"{name}.{n}" for n in range(size)]
        self._log = log

    def acquire(self, seconds: float) -> FileSlot:
        """A free slot; waits `seconds` for one at most, and switches greenlets then.

        Raises ConnectTimeout, ConnectError.
        """
        end = monotonic() + seconds
        is_told = False
        while True:
            for path in self._paths:
                slot = _try(path)
                if slot is not None:
                    return slot
            if monotonic() >= end:
                raise ConnectTimeout(f"all connections to the target are held by {self._holders()}")
            if not is_told:
                self._log.info("waiting for a connection to the target held by %s", self._holders())
                is_told = True
            gevent.sleep(RETRY_INTERVAL)

    def _holders(self) -> str:
        holders = set()
        for path in self._paths:
            with suppress(OSError, ValueError):  # given back in this moment, or not written by gmux
                holders.add(str(int(path.read_text())))
        return "another gmux, process " + ", ".join(sorted(holders))


def _try(path: Path) -> FileSlot | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConnectError(f"cannot take a slot, {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    if not _is_at(descriptor, path):
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return FileSlot(path, descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: its last owner may have removed it before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
