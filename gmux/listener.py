"""Accepting clients: a gevent StreamServer with a greenlet for each client."""

from __future__ import annotations

import errno
import itertools
import logging
import socket
from typing import Any

import gevent
from gevent.server import StreamServer

from gmux import net
from gmux.client import Clients
from gmux.descriptors import Descriptors
from gmux.errors import Overloaded

#: Seconds without accepting when descriptors or memory are short: the loop must not spin meanwhile.
ACCEPT_PAUSE = 0.1

#: Clients accepted in one turn of the loop, where nobody else wants a part of it; each takes about 0.1 ms.
MAX_ACCEPT = 10

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

NO_DESCRIPTORS = "the last descriptors are for connections to the target (ulimit -n)"


def max_lingering(max_clients: int) -> int:
    """Clients beyond `max_clients` that may be on their way out, being told why or still taking their last answer."""
    return max(16, max_clients // 4)


class Listener(StreamServer):  # type: ignore[misc]
    """Takes clients from a listening socket, up to `max_clients`; the others are refused."""

    def __init__(
        self,
        sock: socket.socket,
        clients: Clients,
        max_clients: int,
        descriptors: Descriptors,
        log: logging.Logger,
        has_others: bool = False,
    ) -> None:
        """`has_others`: there may be other workers, and one that takes all it finds would leave them none."""
        self._clients = clients
        self._has_others = has_others
        super().__init__(sock, self._handle_client)
        self._max_clients = max_clients
        self._descriptors = descriptors
        self._log = log
        self._numbers = itertools.count(1)

    @property
    def max_accept(self) -> int:
        return 1 if self._has_others or self._clients.share.scheduler.is_shared else MAX_ACCEPT

    def do_read(self) -> tuple[socket.socket, Any] | None:
        """Accept one client as a plain socket: it has watchers of ours, so gevent's own socket would only cost."""
        try:
            sock, address = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            self._pause(str(error.strerror))
            return None
        if not self._descriptors.may_be_a_client(sock.fileno()):
            sock.close()
            self._pause(NO_DESCRIPTORS)
            return None
        return sock, address

    def _pause(self, reason: str) -> None:
        self._clients.warn("client/accept", f"cannot accept clients for {ACCEPT_PAUSE:g} s: {reason}")
        self.stop_accepting()
        gevent.spawn_later(ACCEPT_PAUSE, self._accept_again)

    def _accept_again(self) -> None:
        if self.started:
            self.start_accepting()

    def adopt(self, sock: socket.socket) -> None:
        """Serve a client that another process accepted; does not switch."""
        if self._descriptors.may_be_a_client(sock.fileno()):
            gevent.spawn(self._handle_adopted, sock)
        else:
            sock.close()
            self._clients.warn("client/adopt", f"a client that another process handed over is closed: {NO_DESCRIPTORS}")

    def _handle_adopted(self, sock: socket.socket) -> None:
        try:
            self._handle_client(sock, sock.getpeername())
        except OSError as error:
            self._log.debug("a client left while it was handed over: %s", error.strerror)
        finally:
            sock.close()

    def _handle_client(self, sock: socket.socket, address: Any) -> None:
        try:
            net.prepare(sock)
            peer = net.format_peer(sock, address)
            name = net.format_ends(sock, address, sock.getsockname())
        except OSError as error:
            self._log.debug("a client left at once: %s", error.strerror)
            return
        clients = self._clients
        number = next(self._numbers)
        self._log.info("#%d: %s", number, name)
        if len(clients.members) >= self._max_clients + max_lingering(self._max_clients) and not clients.end_lingering():
            # All of them still take an answer: there is no place to tell one more.
            reason = "no place is left among those that take their last answer"
            clients.warn(Overloaded.cause, f"#{number} {name}: closed at once: {reason}")
            return
        client = clients.make_client(clients, sock, f"#{number} {peer}", net.format_host(address))
        if len(clients.members) - len(clients.lingering) >= self._max_clients:
            client.serve(Overloaded(f"{self._max_clients} clients are connected (--max-clients)"))
        elif not clients.memory.admit():
            client.serve(Overloaded(clients.memory.full))
        else:
            try:
                client.serve()
            finally:
                clients.memory.dismiss()
        self._log.info("%s: %s", "handed over" if client.is_handed_over else "closed", name)
