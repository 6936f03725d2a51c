"""Permissions to own one upstream connection, shared by all gmux processes of a machine (invariant 1).

A slot is an exclusive `flock` on a file: there are `pool-size` files for a budget. The kernel gives a lock back
whatever becomes of its process, together with the sockets: a crash, a kill or a reload never leaves a slot behind
and never lets a target see one connection too many. The file holds the process that took it, for the log, and is
removed with the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from gmux import net
from gmux.errors import ConnectError, StartError


def runtime_dir(path: str, uid: int, gid: int) -> Path:
    """The folder where processes that share budgets meet, which only their user can write to; made when missing.

    `path` is empty for the usual one. Raises StartError.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    mode = 0o700
    if path:
        folder = Path(path).absolute()
    elif os.geteuid() == 0:
        # Others may pass through it, to sockets of --listen that are there; what gmux puts there is for its user alone.
        folder, mode = Path("/run/gmux"), 0o711
    elif base:
        folder = Path(base, "gmux")
    else:
        folder = Path(tempfile.gettempdir(), f"gmux-{os.geteuid()}")
    hint = "; XDG_RUNTIME_DIR names it" if base and os.geteuid() and not path else ""
    try:
        try:
            folder.mkdir(mode=mode, parents=True)
        except FileExistsError:
            pass
        else:
            os.chown(folder, uid, gid)
        status = folder.lstat()
    except OSError as error:
        raise StartError(f"cannot use the runtime folder {folder}: {error.strerror}{hint}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise StartError(f"cannot use the runtime folder {folder}: File exists{hint}")
    if status.st_uid != uid:
        raise StartError(f"cannot use the runtime folder {folder}: it belongs to user {status.st_uid}, not {uid}")
    if status.st_mode & 0o022:
        raise StartError(f"cannot use the runtime folder {folder}: others may write to it")
    return folder


class Slot(Protocol):
    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot that is held now, and the open connection that came with it, on which `used` requests were sent."""

    slot: Slot
    sock: socket.socket | None = None
    used: int = 0

    def give_back(self) -> None:
        """End the connection with a reset, as it must not outlive the slot, and release that."""
        if self.sock is not None:
            net.prepare_reset(self.sock)
            self.sock.close()
        self.slot.release()


@dataclass(frozen=True, slots=True)
class Ask:
    """What another pool of the same budget says: how many slots it holds, and how many requests wait there.

    `kind` tells whether an open connection is of use to it.
    """

    peer: str
    held: int
    need: int
    kind: str


class State(Enum):
    """How much need a pool has of a connection of its own that is free, from the most to the least."""

    BUSY = auto()  # requests wait
    IDLE = auto()
    SPARE = auto()  # it was not used for a while
    DRAINING = auto()  # no requests will come


class Lender(Protocol):
    """A pool, as the keeper of its slots knows it. No call may switch greenlets."""

    def wanted(self) -> int:
        """The connections that it would make if it had the slots."""

    def need(self) -> int:
        """Its requests that wait."""

    def lend(self) -> None:
        """Somebody asks: give what may be given, by `next_ask` and `give`."""

    def adopt(self, grant: Grant) -> bool:
        """A slot came that is not waited for any more; false: there is no place for it in this turn of the loop."""


class Slots:
    """Keeper of the slots of one pool. This one has no end of them and shares them with nobody."""

    def open(self, lender: Lender) -> None:
        """Begin; asks of others come from now on."""

    def acquire(self) -> Grant | None:
        """A slot, or None when it is not wanted any more; switches greenlets. Raises ConnectError."""
        return Grant(FREE)

    def hurry(self) -> None:
        """Requests wait now."""

    def next_ask(self, state: State) -> Ask | None:
        """Who is to get a connection that is free."""
        return None

    def begin_slice(self) -> None:
        """A connection that others ask for has its first request here now."""

    def has_asks(self) -> bool:
        return False

    def is_kin(self, ask: Ask) -> bool:
        """Whether an open connection is of use to it."""
        return False

    def met(self, ask: Ask) -> None:
        """It gets one connection."""

    def give(self, ask: Ask, slot: Slot, sock: socket.socket | None = None, used: int = 0) -> bool:
        """Hand a slot over, with its connection if there is one; whether it is the other's now."""
        return False

    def close(self) -> None:
        """No more asks."""


class _Free:
    def release(self) -> None:
        pass


FREE = _Free()


class FileSlot:
    """A slot that is held; `release` gives it back. `descriptor` has the lock, in whatever process it is open."""

    def __init__(self, path: Path, descriptor: int, released: Callable[[FileSlot], None]) -> None:
        self.path = path
        self.descriptor = descriptor
        self._released = released
        with suppress(OSError):  # no space left: it is for the log alone
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        # While the lock is held nobody else's slot can be behind the name; who has the file open meets `_is_at`.
        with suppress(OSError):
            self.path.unlink()
        self.let_go()

    def let_go(self) -> None:
        """The lock is another process's, which has its own descriptor of it."""
        os.close(self.descriptor)
        self._released(self)


class SlotFiles:
    """The slots of one budget on this machine, and those of them that are held here."""

    def __init__(self, folder: Path, budget: str, size: int) -> None:
        self.name = hashlib.sha256(budget.encode()).hexdigest()[:16]
        self.folder = folder
        self._size = size
        self._paths = [folder / f"{self.name}.{n}" for n in range(size)]
        self._held: set[FileSlot] = set()

    def __len__(self) -> int:
        return len(self._held)

    def take(self) -> FileSlot | None:
        """A free slot. Raises ConnectError."""
        for path in self._paths:
            descriptor = _lock(path)
            if descriptor is None:
                continue
            slot = self.hold(path, descriptor)
            if self._is_over():
                slot.release()
                return None
            return slot
        return None

    def hold(self, path: Path, descriptor: int) -> FileSlot:
        """The slot whose lock is in `descriptor`."""
        slot = FileSlot(path, descriptor, self._held.discard)
        self._held.add(slot)
        return slot

    def has(self, name: str, descriptors: list[int]) -> bool:
        """Whether the first of `descriptors` is of the slot of that name."""
        return bool(descriptors) and name.startswith(self.name) and _is_at(descriptors[0], self.folder / name)

    def _is_over(self) -> bool:
        """Whether more are taken than there shall be, as some of a larger pool are held from before a reload."""
        paths = set(self.folder.glob(f"{self.name}.[0-9]*"))
        beyond = paths.difference(self._paths)
        return any(map(_is_locked, beyond)) and sum(map(_is_locked, paths)) > self._size

    def holders(self) -> str:
        """The processes that hold slots, for the log."""
        holders = set()
        for path in self._paths:
            with suppress(OSError, ValueError):  # given back in this moment, or not written by gmux
                holders.add(int(path.read_text()))
        return ", ".join(["another gmux", *(f"process {pid}" for pid in sorted(holders))])


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(path: Path) -> int | None:
    try:
        descriptor = _open(path, os.O_CREAT)
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
    return descriptor


def _is_locked(path: Path) -> bool:
    try:
        descriptor = _open(path, 0)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: its last owner may have removed it before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
