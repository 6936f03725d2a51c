"""Processes that hold a slot and a connection and are killed: is the slot free before the target sees the end?

Run as a program, as it forks and must have no loop of gevent. Its words: how the victim has the two, how the next one
takes the slot, how often. It prints how often the target still had the connection when the slot was taken.

    unordered   the connection's descriptor is below that of its slot, as before gmux ordered them
    ordered     the same, then put above it
    threaded    as unordered, in a process of several threads
    unread      both are in a message that the victim has not read

    bare        by the lock alone
    gmux        as gmux takes a slot
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gmux import net
from gmux.folder import Folder
from gmux.mailbox import Mailbox
from gmux.sharing import SharedSlots
from gmux.slot_files import FileSlot, Process, SlotFiles
from gmux.slots import Ask

BUDGET = "target"

#: Sockets of the victim beside its connection.
OTHERS = 900


class Round:
    """One victim. `path` is that of its slot, `peer` the target's end of its connection."""

    def __init__(self, folder: Path, order: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self._address = listening.getsockname()
            self._folder = folder
            self.pid = self._fork(self._wait_for_message if order == "unread" else lambda: self._hold(order))
            self.giver = self._give() if order == "unread" else None
            self.peer, _ = listening.accept()
        self.peer.setblocking(False)
        (self.path,) = (path for path in folder.iterdir() if len(path.name.split(".")) == 2)

    def _fork(self, victim: Callable[[], object]) -> int:
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            held = victim()
            os.write(writer, b".")
            time.sleep(60)
            os._exit(held is None)
        os.close(writer)
        assert os.read(reader, 1), "the victim could not begin"
        os.close(reader)
        return pid

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._address)
        net.prepare_reset(sock)
        return sock

    def _hold(self, order: str) -> object:
        sock = self._connect()
        # What else is open makes the time between the two closes long enough to be seen.
        others = [socket.socket() for _ in range(OTHERS)]
        slot = SlotFiles(self._folder, BUDGET, 1).take()
        assert slot is not None and sock.fileno() < slot.descriptor
        if order == "ordered":
            sock = slot.above(sock)
        if order == "threaded":
            for _ in range(4):
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return slot, sock, others

    def _wait_for_message(self) -> object:
        return Mailbox(Folder(self._folder), "victim")

    def _give(self) -> SharedSlots:
        slots = SharedSlots(Folder(self._folder), BUDGET, 1, "", logging.getLogger("gmux"))
        (peer,) = (path.name for path in self._folder.glob("victim.*"))
        sock = self._connect()
        slot = slots._files.take()
        victim = Process.parse(f"{self.pid}")
        assert slots.give(Ask(peer, 0, 1, "", str(victim)), slot, sock)
        sock.close()
        return slots

    def is_early(self, take: Callable[[Path], bool]) -> bool:
        """Whether the target still has the connection when `take` has got the slot of the victim."""
        os.kill(self.pid, signal.SIGKILL)
        while not take(self.path):
            pass
        try:
            self.peer.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        os.waitpid(self.pid, 0)
        self.peer.close()


def taker(how: str, folder: Path) -> Callable[[Path], bool]:
    if how == "gmux":
        files = SlotFiles(folder, BUDGET, 1)
        return lambda path: isinstance(files.take(), FileSlot)

    def take(path: Path) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    (path,) = (path for path in folder.iterdir() if len(path.name.split(".")) == 2)
    descriptor = os.open(path, os.O_RDWR)
    return take


def main(order: str, how: str, rounds: int) -> int:
    early = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            victim = Round(Path(name), order)
            early += victim.is_early(taker(how, Path(name)))
            victim.close()
    return early


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
