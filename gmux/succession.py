"""Clients of a process that drains go on in another one that listens on the same socket, and notice nothing.

Each process has a mailbox for each of its listening sockets, named after the socket itself, which the kernel gives a
number: the new worker of a reload has it, the new master's workers of an upgrade have it, and so have the other workers
of a service. A client is handed over between two messages, with nothing of it read that was not dealt with.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable

from gmux import net
from gmux.folder import Folder
from gmux.mailbox import Mailbox, Message, Sent


class Succession:
    """Of one listening socket. Made before the fork: what is sent to a worker waits for it to begin."""

    def __init__(self, folder: Folder, listening: socket.socket, owner: tuple[int, int]) -> None:
        """Raises StartError."""
        self._mailbox = Mailbox(folder, f"listener-{os.fstat(listening.fileno()).st_ino}", owner)
        self._family = listening.family
        self._port = net.local_port(listening)

    def close_copy(self) -> None:
        """Let go of it behind a fork: it is the worker's."""
        self._mailbox.close_copy()

    def open(self, protocol: str, adopt: Callable[[socket.socket], None], log: logging.Logger) -> None:
        """Take clients of others from now on; `adopt` is called with the socket of each and must not switch."""
        self._protocol = protocol
        self._adopt = adopt
        self._log = log
        self._mailbox.open(self._received, log)

    def begin(self) -> bool:
        """Take the clients on their way here, and no more; whether there is anybody to take them and ours."""
        self._mailbox.leave()
        return bool(self._mailbox.peers())

    def hand_over(self, sock: socket.socket) -> Sent:
        """Give a client to one of the others; its descriptor here is of no more use then."""
        peers = self._mailbox.peers()
        random.shuffle(peers)
        outcome = Sent.GONE
        for peer in peers:
            sent = self._mailbox.send(peer, {"protocol": self._protocol}, [sock.fileno()])
            if sent is Sent.DONE:
                return sent
            if sent is Sent.LATER:
                outcome = sent
        return outcome

    def close(self) -> None:
        self._mailbox.close()

    def _received(self, message: Message, descriptors: list[int]) -> None:
        match message, descriptors:
            case {"protocol": str(protocol)}, [descriptor] if sock := self._open(descriptor):
                if protocol == self._protocol:
                    self._adopt(sock)
                else:
                    # A reload has changed the protocol. To the client it is an end between two messages.
                    self._log.debug("a client of %s is closed: it is %s now", protocol, self._protocol)
                    sock.close()
            case _:
                self._mailbox.reject(descriptors, "no client of this listener came with it")

    def _open(self, descriptor: int) -> socket.socket | None:
        """The client that a descriptor of another process is; None: it is something else, and stays open."""
        sock = net.open_stream(descriptor, self._family)
        if sock is not None and net.local_port(sock) != self._port:
            # Not a connection to this listener: that of a target, say.
            sock.detach()
            return None
        return sock
