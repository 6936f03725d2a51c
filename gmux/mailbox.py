"""Messages between the gmux processes of one user on one machine: small ones, with open files in them (SCM_RIGHTS).

A mailbox is a datagram socket in the runtime folder, named after its subject: who has to do with the same thing finds
it there. One whose process is gone refuses messages, and its name is removed by who finds that out. Nothing waits and
nothing is acknowledged: a message that cannot be sent now is the sender's to send again, or not to.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any

from gevent import get_hub

from gmux.errors import StartError

READ = 1

#: In each name: gmux of another form of messages does not find the mailbox, and does without.
FORM = "m1"

MAX_MESSAGE = 4096

#: A slot with its connection; a client is one.
MAX_DESCRIPTORS = 2
ANCILLARY_SIZE = socket.CMSG_SPACE(MAX_DESCRIPTORS * array("i").itemsize)

#: Messages taken in one turn of the loop; then clients and targets have theirs.
MAX_AT_ONCE = 64

Message = dict[str, Any]
Received = Callable[[Message, list[int]], None]


class Sent(Enum):
    """What became of a message."""

    DONE = auto()
    LATER = auto()  # the mailbox is full
    GONE = auto()  # nobody has it


class Mailbox:
    """One that others may send to, under `name`. Made before a fork, it is the child's once the parent closed it."""

    def __init__(self, folder: Path, subject: str, owner: tuple[int, int] = (-1, -1)) -> None:
        """Raises StartError. `owner` are the user and group of those who use it; -1: this one."""
        self._subject = subject
        self.name = f"{subject}.{FORM}.{secrets.token_hex(4)}"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._watcher: Any = None
        self._number = -1
        try:
            self._number = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            # The name of a socket has a limit that the name of the folder may come close to.
            self._folder = Path(f"/proc/self/fd/{self._number}")
            # Whatever the umask, and before others can find it.
            os.fchmod(self._sock.fileno(), 0o600)
            self._sock.bind(str(self._folder / self.name))
            if owner != (-1, -1):
                # The folder is the owner's, who may have put a link in its place.
                os.chown(self._folder / self.name, *owner, follow_symlinks=False)
        except OSError as error:
            self.close_copy()
            raise StartError(f"cannot use the runtime folder {folder}: {error.strerror}") from None

    def open(self, received: Received) -> None:
        """Call `received` from the loop for each message, whose descriptors are its own then; it must not switch."""
        self._received = received
        self._watcher = get_hub().loop.io(self._sock.fileno(), READ)
        self._watcher.start(self._take)

    def _take(self, most: int = MAX_AT_ONCE) -> None:
        for _ in range(most):
            try:
                # Not `socket.recv_fds`, which forgets the flag.
                data, ancillary, _, _ = self._sock.recvmsg(MAX_MESSAGE, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return
            descriptors = array("i")
            for _, _, content in ancillary:
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
            try:
                message = json.loads(data)
            except ValueError:
                message = {}
            self._received(message if isinstance(message, dict) else {}, list(descriptors))

    def peers(self) -> list[str]:
        """The names of the others with this subject."""
        return [path.name for path in self._folder.glob(f"{self._subject}.{FORM}.*") if path.name != self.name]

    def send(self, peer: str, message: Message, descriptors: Sequence[int] = ()) -> Sent:
        """Send to the mailbox of that name, with descriptors that stay open here."""
        if "/" in peer:
            return Sent.GONE  # no mailbox has such a name
        path = str(self._folder / peer)
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
        with suppress(OSError):
            (self._folder / self.name).unlink()

    def leave(self) -> None:
        """Take what was sent, and no more: nothing is lost when it is closed then."""
        self.hide()
        self._take(sys.maxsize)

    def close_copy(self) -> None:
        """Let go of it behind a fork: it is the other process's."""
        self._sock.close()
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def close(self) -> None:
        self.hide()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        self.close_copy()


def sweep(folder: Path) -> None:
    """Remove the mailboxes of processes that were killed. Raises StartError."""
    sweeper = Mailbox(folder, "sweeper")
    for path in folder.glob(f"*.{FORM}.*"):
        sweeper.send(path.name, {})
    sweeper.close()
