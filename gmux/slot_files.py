"""The slots of one machine: each is an exclusive `flock` on a file in the runtime folder, `pool-size` for a budget.

The kernel gives a lock back whatever becomes of its process, together with the sockets: a crash, a kill or a reload
never leaves a slot behind and never lets a target see one connection too many. Two things see to the order in which it
does. A dying process closes its descriptors from the highest down, so a connection's is above its slot's. And a slot
that was released has no file, so a file that nobody has locked is of a process that died, which its taker waits for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from gmux.errors import ConnectError
from gmux.folder import TOUCH_INTERVAL

#: Seconds that are waited for a process that dies. Its number may be one of another container, where it says nothing.
DEATH_TIMEOUT = 1.0

#: Files that one look for a free slot opens at most. All of a pool of 1000 would stop the loop for 4 ms.
MAX_LOOKS = 32


#: Of a process, and a time in ticks.
_NUMBER = re.compile(r"[0-9]{1,20}")

#: More than the largest pool has. A slot has one name.
_SLOT_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from a later one with its number by when it was started, in ticks since the machine was.

    `start` is empty where it is not known, as in what an older gmux wrote.
    """

    pid: int
    start: str = ""

    @classmethod
    def this(cls) -> Process:
        return cls(os.getpid(), _read_stat(os.getpid())[19].decode())

    @classmethod
    def parse(cls, text: str) -> Process | None:
        """Reads what `str` gives, and a number alone; None: neither."""
        words = text.split()
        if len(words) not in (1, 2) or not all(_NUMBER.fullmatch(word) for word in words):
            return None
        return cls(int(words[0]), *words[1:])

    def __str__(self) -> str:
        return f"{self.pid} {self.start}".rstrip()

    def is_gone(self) -> bool:
        """Whether it has closed all that it had open."""
        try:
            fields = _read_stat(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False
        state, threads, start = fields[0], int(fields[17]), fields[19].decode()
        if self.start and self.start != start:
            return True
        # The first thread may have ended before the others, and the last one closes.
        return state in (b"Z", b"X") and threads <= 1


def _read_stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on (proc(5)); the second may hold anything. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


class FileSlot:
    """A slot that is held; `release` gives it back. `descriptor` has the lock, in whatever process it is open."""

    def __init__(self, path: Path, descriptor: int, holder: Process, released: Callable[[FileSlot], None]) -> None:
        self.path = path
        self.descriptor = descriptor
        self._holder = str(holder)
        self._released = released
        self.sign_back()

    def sign(self, holder: str) -> None:
        """Write down whose it is: for who finds the file unlocked, and for the log."""
        text = f"{holder}\n".encode()
        with suppress(OSError):  # no space left: the order of descriptors must do
            os.pwrite(self.descriptor, text, 0)
            os.ftruncate(self.descriptor, len(text))

    def sign_back(self) -> None:
        """Write down that it is this process's."""
        self.sign(self._holder)

    def above(self, sock: socket.socket) -> socket.socket:
        """The same connection by a descriptor above the slot's; `sock` is closed if that is another. Raises OSError."""
        if sock.fileno() > self.descriptor:
            return sock
        number = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, self.descriptor + 1)
        moved = socket.socket(sock.family, sock.type, sock.proto, fileno=number)
        moved.settimeout(sock.gettimeout())
        sock.close()
        return moved

    def is_in_place(self) -> bool:
        """Whether its file still has its name."""
        return _is_at(self.descriptor, self.path)

    def mend(self) -> bool:
        """Lock a new file in place of one that was removed; false: another process has done so. Raises OSError."""
        descriptor = _lock(self.path)
        if descriptor is None:
            return False
        # The number stays, and with it the place below that of the connection.
        os.dup2(descriptor, self.descriptor, inheritable=False)
        os.close(descriptor)
        self.sign_back()
        return True

    def release(self) -> None:
        # While the lock is held nobody else's slot can be behind the name, unless the file was removed by hand. Who has
        # the file open meets `_is_at`.
        with suppress(OSError):
            if self.is_in_place():
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
        self.process = Process.this()
        self._size = size
        self._paths = {folder / f"{self.name}.{n}": None for n in range(size)}
        self._names = {path.name for path in self._paths}
        # Names of files that are still to be looked at, the next one last.
        self._round: list[str] = []
        self._held: set[FileSlot] = set()
        # Of a file that nobody has locked: who had it, and when it was first found so.
        self._endings: dict[Path, tuple[Process, float]] = {}
        self._touched = monotonic()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_one_ending(self) -> bool:
        """Whether the last `take` found a slot that is free as soon as a process is gone."""
        now = monotonic()
        return any(now - since <= 2 * DEATH_TIMEOUT for _, since in self._endings.values())

    def take(self) -> FileSlot | None:
        """A free slot, if a look at a few files finds one; the next look goes on. Raises ConnectError."""
        present = self._list()
        has_removed = False
        for path in self._worth_a_look(present):
            try:
                descriptor = _lock(path)
            except OSError as error:
                raise ConnectError(f"cannot take a slot, {path}: {error.strerror}") from None
            if descriptor is None:
                self._endings.pop(path, None)
                continue
            if self._is_ending(path, descriptor):
                os.close(descriptor)
                continue
            slot = self.hold(path, descriptor)
            if path in self._paths and not (present - self._names and self._is_over()):
                return slot
            # One too many while a larger pool is held from before a reload, or what a dead process left of that.
            slot.release()
            has_removed = True
        # Each time there are fewer of them, so that this ends.
        return self.take() if has_removed and len(self._list()) < len(present) else None

    @property
    def is_half_way(self) -> bool:
        """Whether the last `take` found nothing, and has not looked at all files yet."""
        return bool(self._round)

    def _list(self) -> set[str]:
        """The names of the slots that have a file: each is held, or was when its process died. Raises ConnectError."""
        try:
            return {name for name in os.listdir(self.folder) if self._is_name(name)}
        except OSError as error:
            raise ConnectError(f"cannot take a slot, {self.folder}: {error.strerror}") from None

    def _is_name(self, name: str) -> bool:
        number = name.removeprefix(f"{self.name}.")
        return number != name and _SLOT_NUMBER.fullmatch(number) is not None

    def _worth_a_look(self, present: set[str]) -> list[Path]:
        """Files that may be of a free slot, MAX_LOOKS at most: first those that are not there."""
        missing = self._names - present if len(present) < self._size else ()
        paths = [self.folder / name for name in sorted(missing, key=_number)[:MAX_LOOKS]]
        paths += list(self._endings)[: MAX_LOOKS - len(paths)]
        held = {slot.path.name for slot in self._held}
        if not self._round:
            self._round = sorted(present - held, key=_number, reverse=True)
        while self._round and len(paths) < MAX_LOOKS:
            name = self._round.pop()
            if name in present and name not in held:
                paths.append(self.folder / name)
        return paths

    def _is_over(self) -> bool:
        """Whether more are taken than there shall be."""
        return len(self._list()) > self._size

    def hold(self, path: Path, descriptor: int) -> FileSlot:
        """The slot whose lock is in `descriptor`."""
        slot = FileSlot(path, descriptor, self.process, self._held.discard)
        self._held.add(slot)
        return slot

    def has(self, name: str, descriptor: int) -> bool:
        """Whether `descriptor` has the lock of the slot of that name, which is not held here yet."""
        path = self.folder / name
        if not self._is_name(name) or any(slot.path == path for slot in self._held):
            return False
        try:
            # Asked before it is opened, which may have effects where it is no file of gmux.
            if not stat.S_ISREG(path.lstat().st_mode):
                return False
            other = _open(path, 0)
        except OSError:
            return False
        try:
            # Somebody has the lock, and who may have it again is who has it.
            return _is_at(descriptor, path) and not _try_lock(other, fcntl.LOCK_SH) and _try_lock(descriptor)
        finally:
            os.close(other)

    def look(self, warn: Callable[[str], None], lost: Callable[[FileSlot], None]) -> None:
        """Put back the files that were removed of slots held here; `lost` is called with what is another's by now."""
        is_time = monotonic() - self._touched >= TOUCH_INTERVAL
        if is_time:
            self._touched = monotonic()
        for slot in tuple(self._held):
            if slot not in self._held:
                continue  # it went with another one
            try:
                if slot.is_in_place():
                    if is_time:
                        os.utime(slot.descriptor)
                    continue
                is_mended = slot.mend()
            except OSError as error:
                warn(f"the slot file {slot.path} was removed, and cannot be made again ({error.strerror})")
                continue
            if is_mended:
                warn(f"the slot file {slot.path} was removed, and is there again")
            else:
                warn(f"the slot file {slot.path} was removed, and another gmux has the slot: a connection is closed")
                lost(slot)

    def _is_ending(self, path: Path, descriptor: int) -> bool:
        """Whether the file is of a process that may still have its connection, and was not waited for long enough."""
        last = Process.parse(os.pread(descriptor, 64, 0).decode(errors="replace"))
        if last is None or last == self.process or last.is_gone():
            self._endings.pop(path, None)
            return False
        now = monotonic()
        known, since = self._endings.get(path, (last, now))
        # What was found long ago was another death, or this process slept.
        if known != last or now - since > 2 * DEATH_TIMEOUT:
            since = now
        self._endings[path] = last, since
        if now - since < DEATH_TIMEOUT:
            return True
        del self._endings[path]
        return False

    def holders(self) -> str:
        """Processes that hold slots, for the log. Raises ConnectError."""
        holders = set()
        names = sorted(self._list(), key=_number)
        for name in names[:: len(names) // MAX_LOOKS + 1]:
            # It may be given back in this moment, or not be written by gmux.
            with suppress(OSError, UnicodeDecodeError):
                if (process := Process.parse((self.folder / name).read_text())) is not None:
                    holders.add(process.pid)
        return ", ".join(["another gmux", *(f"process {pid}" for pid in sorted(holders))])


def _number(name: str) -> int:
    """The number of the slot whose file has that name."""
    return int(name.rpartition(".")[2])


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(path: Path) -> int | None:
    """A descriptor of the file with its lock; None: another process has it. Raises OSError."""
    descriptor = _open(path, os.O_CREAT)
    if not _try_lock(descriptor) or not _is_at(descriptor, path):
        os.close(descriptor)
        return None
    return descriptor


def _try_lock(descriptor: int, lock: int = fcntl.LOCK_EX) -> bool:
    """Take the lock of an open file, if no other has it; whether it is had now."""
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: its last owner may have removed it before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
