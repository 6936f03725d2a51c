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
from gmux.kinds import MAX_UNIX_PATH

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
        self._folder = folder
        self._subject = subject
        self.name = f"{subject}.{FORM}.{secrets.token_hex(4)}"
        path = folder / self.name
        if len(os.fsencode(path)) > MAX_UNIX_PATH:
            raise StartError(f"cannot use the runtime folder {folder}: its name is too long")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._watcher: Any = None
        try:
            self._sock.bind(str(path))
            if owner != (-1, -1):
                os.chown(path, *owner)
        except OSError as error:
            self._sock.close()
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
            self._received(message, list(descriptors))

    def peers(self) -> list[str]:
        """The names of the others with this subject."""
        return [path.name for path in self._folder.glob(f"{self._subject}.{FORM}.*") if path.name != self.name]

    def send(self, peer: str, message: Message, descriptors: Sequence[int] = ()) -> Sent:
        """Send to the mailbox of that name, with descriptors that stay open here."""
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

    def close(self) -> None:
        self.hide()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        self._sock.close()


def sweep(folder: Path) -> None:
    """Remove the mailboxes of processes that were killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        for path in folder.glob(f"*.{FORM}.*"):
            try:
                sock.connect(str(path))
            except ConnectionRefusedError:
                with suppress(OSError):
                    path.unlink()
            except OSError:
                continue
