"""Messages between the gmux processes of one user on one machine: small ones, with open files in them (SCM_RIGHTS).

A mailbox is a datagram socket in the runtime folder, named after its subject: who has to do with the same thing finds
it there. One whose process is gone refuses messages, and its name is removed by who finds that out. Nothing waits and
nothing is acknowledged: a message that cannot be sent now is the sender's to send again, or not to.

Any program of the same user may send anything, so who receives a message checks it and what came with it, and rejects
what it does not believe.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import socket
import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from time import monotonic
from typing import Any

from gevent import get_hub

from gmux import net
from gmux.errors import StartError
from gmux.folder import TOUCH_INTERVAL, Folder
from gmux.ratelimit import LimitedWarnings
from gmux.scheduler import READ

#: In each name: gmux of another form of messages does not find the mailbox, and does without.
FORM = "m2"

MAX_MESSAGE = 4096

#: A connection with its slot; a client is one.
MAX_DESCRIPTORS = 2
ANCILLARY_SIZE = socket.CMSG_SPACE(MAX_DESCRIPTORS * array("i").itemsize)

#: Messages taken in one turn of the loop; then clients and targets have theirs.
MAX_AT_ONCE = 64

Message = dict[str, Any]
Received = Callable[[Message, list[int]], None]

#: What is sent to find out whether anybody has a mailbox.
KNOCK: Message = {}


class Sent(Enum):
    """What became of a message."""

    DONE = auto()
    LATER = auto()  # the mailbox is full
    GONE = auto()  # nobody has it


class Mailbox:
    """One that others may send to, under `name`. Made before a fork, it is the child's once the parent closed it."""

    def __init__(self, folder: Folder, subject: str, owner: tuple[int, int] = (-1, -1)) -> None:
        """Raises StartError. `owner` are the user and group of those who use it; -1: this one."""
        self._folder = folder
        self._subject = subject
        self._owner = owner
        self.name = f"{subject}.{FORM}.{secrets.token_hex(4)}"
        self._names = re.compile(rf"{re.escape(subject)}\.{FORM}\.[0-9a-f]{{8}}")
        self._path = folder.at / self.name
        self._watcher: Any = None
        self._touched = monotonic()
        try:
            self._sock, self._file = self._bind()
        except OSError as error:
            raise StartError(f"cannot use the runtime folder {folder.path}: {error.strerror}") from None

    def _bind(self) -> tuple[socket.socket, net.SocketFile]:
        """A socket of this name, and its file. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            # Whatever the umask, and before others can find it.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(str(self._path))
            if self._owner != (-1, -1):
                # The folder is the owner's, who may have put a link in its place.
                os.chown(self._path, *self._owner, follow_symlinks=False)
            return sock, net.SocketFile(str(self._path))
        except BaseException:
            sock.close()
            raise

    def open(self, received: Received, log: logging.Logger) -> None:
        """Call `received` from the loop for each message, whose descriptors are its own then; it must not switch."""
        self._received = received
        self._warn = LimitedWarnings(log)
        self._start_reading()
        self._folder.watch(self._look)

    def _start_reading(self) -> None:
        self._watcher = get_hub().loop.io(self._sock.fileno(), READ)
        self._watcher.start(self._take)

    def _stop_reading(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None

    def _look(self) -> None:
        """Be there again under the same name, if that was removed."""
        try:
            if self._file.is_there():
                if monotonic() - self._touched >= TOUCH_INTERVAL:
                    self._touched = monotonic()
                    os.utime(self._path, follow_symlinks=False)
                return
            self._path.unlink(missing_ok=True)
            sock, file = self._bind()
        except OSError as error:
            self._folder.warn(f"the mailbox {self.name} was removed, and cannot be made again ({error.strerror})")
            return
        # Nobody finds the old one any more, but it may hold messages.
        self._take(sys.maxsize)
        self._stop_reading()
        self._sock.close()
        self._sock, self._file = sock, file
        self._start_reading()
        self._folder.warn(f"the mailbox {self.name} was removed, and is there again")

    def _take(self, most: int = MAX_AT_ONCE) -> None:
        for _ in range(most):
            try:
                # Not `socket.recv_fds`, which forgets the flag.
                data, ancillary, flags, _ = self._sock.recvmsg(MAX_MESSAGE, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return
            descriptors = _read_descriptors(ancillary)
            message = None if flags & socket.MSG_TRUNC else _read_message(data)
            if flags & socket.MSG_CTRUNC:
                self.reject(descriptors, "more files came with it than belong to one, or than may be open (ulimit -n)")
            elif message is None:
                self.reject(descriptors, "it cannot be read")
            elif descriptors or message != KNOCK:
                self._received(message, descriptors)

    def reject(self, descriptors: Sequence[int], reason: str) -> None:
        """Close what came with a message that is not believed, in that order, and warn."""
        for descriptor in descriptors:
            with suppress(OSError):  # of a file on a disk that is full, say; it is closed all the same
                os.close(descriptor)
        self._warn("mailbox/message", f"a message to the mailbox {self.name} is dropped: {reason}")

    def is_peer(self, name: str) -> bool:
        """Whether another mailbox with this subject may have that name."""
        return self._names.fullmatch(name) is not None and name != self.name

    def peers(self) -> list[str]:
        """The names of the others with this subject."""
        # Not `glob`, which takes longer where a large pool has many files here.
        try:
            names = os.listdir(self._folder.at)
        except OSError:
            return []
        return [name for name in names if self.is_peer(name)]

    def send(self, peer: str, message: Message, descriptors: Sequence[int] = ()) -> Sent:
        """Send to the mailbox of that name, with descriptors that stay open here."""
        if "/" in peer:
            return Sent.GONE  # no mailbox has such a name
        path = str(self._folder.at / peer)
        # Not `socket.send_fds`, which forgets the address.
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        try:
            self._sock.sendmsg([json.dumps(message).encode()], ancillary, 0, path)
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                with suppress(OSError):
                    os.unlink(path)
            is_gone = error.errno in (errno.ECONNREFUSED, errno.ENOENT)
            return Sent.GONE if is_gone else Sent.LATER
        return Sent.DONE

    def hide(self) -> None:
        """Others do not find it any more."""
        if self._watcher is not None:
            self._folder.unwatch(self._look)
        self._file.remove()

    def leave(self) -> None:
        """Take what was sent, and no more: nothing is lost when it is closed then."""
        self.hide()
        self._take(sys.maxsize)

    def close_copy(self) -> None:
        """Let go of it behind a fork: it is the other process's."""
        self._sock.close()

    def close(self) -> None:
        self.hide()
        if self._watcher is not None:
            self._warn.flush()
        self._stop_reading()
        self.close_copy()


def _read_descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return list(descriptors)


def _read_message(data: bytes) -> Message | None:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):  # brackets in brackets, by the thousand
        return None
    return message if isinstance(message, dict) else None


def sweep(path: Path) -> None:
    """Remove the mailboxes of processes that were killed from the folder. Raises StartError."""
    folder = Folder(path)
    sweeper = Mailbox(folder, "sweeper")
    for mailbox in path.glob(f"*.{FORM}.*"):
        sweeper.send(mailbox.name, KNOCK)
    sweeper.close()
    folder.close()
