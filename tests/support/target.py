"""A target that misbehaves on order, in the process and loop of the test, and writes down what it sees.

What it does with a message is a list of steps, each `step(connection, request)`. `never` is the empty list: it goes on
reading. A target is told what to do by `behaviour(connection, request) -> steps`, or by one list for all messages.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import gevent
from gevent import socket
from gevent.event import Event
from gevent.lock import Semaphore
from gevent.server import StreamServer

from gmux.net import Address
from tests.support.framing import LINE, Framing
from tests.support.stream import Closed, SocketStream

Step = Callable[["Connection", bytes], None]
Steps = Sequence[Step]
Behaviour = Callable[["Connection", bytes], Steps]


class Connection(SocketStream):
    """A connection as the target sees it: it counts until the target has read its end, or ended it."""

    def __init__(self, target: Target, sock: Any) -> None:
        super().__init__(sock)
        self.target = target
        self.requests: list[bytes] = []
        self.is_open = True
        # Idle as long as the test likes; a close by gmux or the end of the test ends it.
        self.sock.settimeout(None)
        with suppress(OSError):  # reset before it was served, or a Unix socket
            # Without Nagle's delay: what a test sends is there when gmux is next given a turn.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError:
            raise Closed(is_reset=True) from None

    def close(self) -> None:
        self._end(self.fin)

    def cut(self) -> None:
        self._end(self.reset)

    def _end(self, how: Callable[[], None]) -> None:
        if self.is_open:
            self.is_open = False
            self.target.open -= 1
            how()


# Steps.


def answer(connection: Connection, request: bytes) -> None:
    connection.send(connection.target.framing.answer(request))


def twice(connection: Connection, request: bytes) -> None:
    """The answer and another one behind it, in one write."""
    connection.send(connection.target.framing.answer(request) * 2)


def half(connection: Connection, request: bytes) -> None:
    data = connection.target.framing.answer(request)
    connection.send(data[: len(data) // 2])


def rest(connection: Connection, request: bytes) -> None:
    """What `half` has left."""
    data = connection.target.framing.answer(request)
    connection.send(data[len(data) // 2 :])


def bytewise(connection: Connection, request: bytes) -> None:
    data = connection.target.framing.answer(request)
    for at in range(len(data)):
        connection.send(data[at : at + 1])
        gevent.sleep(0)


def garbage(connection: Connection, request: bytes) -> None:
    connection.send(connection.target.framing.garbage or b"")


def close(connection: Connection, request: bytes) -> None:
    connection.close()


def reset(connection: Connection, request: bytes) -> None:
    connection.cut()


def hang(connection: Connection, request: bytes) -> None:
    """Read nothing more, not even the end of the connection, until the test lets go."""
    connection.target.released.wait()


def pause(seconds: float) -> Step:
    return lambda connection, request: gevent.sleep(seconds)


def send(data: bytes) -> Step:
    return lambda connection, request: connection.send(data)


def hold(gate: Semaphore) -> Step:
    """Wait until the test releases `gate`, once for each message."""
    return lambda connection, request: gate.acquire()


def padded(size: int) -> Step:
    """An answer of `size` bytes that begins with the request."""

    def step(connection: Connection, request: bytes) -> None:
        framing = connection.target.framing
        connection.send(framing.wrap(framing.payload(request).ljust(size, b".")))

    return step


#: Read on, and never answer.
never: Steps = ()


# Behaviours.


def in_turn(*each: Steps) -> Behaviour:
    """One list of steps for each message that comes, over all connections; good answers when they are used up."""
    left = iter(each)
    return lambda connection, request: next(left, (answer,))


def every(n: int, steps: Steps) -> Behaviour:
    """`steps` for every nth message, good answers between."""
    count = iter(range(1, 1_000_000_000))
    return lambda connection, request: steps if next(count) % n == 0 else (answer,)


def at_random(dice: random.Random, share: float, *faults: Steps) -> Behaviour:
    """One of `faults` for a `share` of the messages."""
    return lambda connection, request: dice.choice(faults) if dice.random() < share else (answer,)


class Target(StreamServer):
    """Listens on a port of its own, unless `address` says where. Use it in a `with`.

    limit       connections above this number are accepted and closed at once, and count as `refused`
    fin_delay   seconds from when the target's kernel knows the end of a connection to when the target does
    greeting    steps for each new connection, before its first message; the request they get is empty
    """

    def __init__(
        self,
        behaviour: Behaviour | Steps = (answer,),
        framing: Framing = LINE,
        limit: int = 0,
        fin_delay: float = 0.0,
        greeting: Steps = (),
        address: Address = ("127.0.0.1", 0),
    ) -> None:
        super().__init__(listen_unix(address) if isinstance(address, str) else address, self._serve)
        self.behaviour = behaviour
        self.framing = framing
        self.limit = limit
        self.fin_delay = fin_delay
        self.greeting = greeting
        self.connections: list[Connection] = []
        self.open = self.peak = self.refused = 0
        # Requests by which gmux finds out whether it may put others together are answered well, and counted here alone.
        self.passes_probes = True
        self.probed = 0
        self.released = Event()

    def __enter__(self) -> Target:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.released.set()
        self.close()
        self.close_all()

    @property
    def where(self) -> Address:
        return self.address if isinstance(self.address, str) else (self.server_host, self.server_port)

    @property
    def requests(self) -> list[bytes]:
        """The payloads of all messages, in the order in which they came on each connection."""
        return [request for connection in self.connections for request in connection.requests]

    @property
    def accepted(self) -> int:
        return len(self.connections)

    def times(self) -> Counter[bytes]:
        """How often each payload came."""
        return Counter(self.requests)

    def say(self, data: bytes) -> None:
        """Send `data`, which nobody asked for, on every connection."""
        for connection in self.connections:
            if connection.is_open:
                connection.send(data)

    def close_all(self) -> None:
        for connection in self.connections:
            connection.close()

    def reset_all(self) -> None:
        for connection in self.connections:
            connection.cut()

    def _serve(self, sock: Any, address: Any) -> None:
        self.open += 1
        self.peak = max(self.peak, self.open)
        if self.limit and self.open > self.limit:
            self.open -= 1
            self.refused += 1
            return
        connection = Connection(self, sock)
        self.connections.append(connection)
        with suppress(Closed):
            self._run(connection, self.greeting, b"")
            while connection.is_open:
                request = self.framing.read(connection)
                if self.passes_probes and (probed := self.framing.probe_answer(request)):
                    self.probed += 1
                    connection.send(probed)
                    continue
                connection.requests.append(self.framing.payload(request))
                behaviour = self.behaviour
                self._run(connection, behaviour(connection, request) if callable(behaviour) else behaviour, request)
        if connection.is_open and self.fin_delay:
            gevent.sleep(self.fin_delay)
        connection.close()

    def _run(self, connection: Connection, steps: Steps, request: bytes) -> None:
        for step in steps:
            step(connection, request)


def listen_unix(path: str, backlog: int = 50) -> Any:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(backlog)
    return sock


#: What holds the ports of `closed_port`, until the tests end.
_reserved: list[Any] = []


def closed_port() -> tuple[str, int]:
    """An address where nobody listens, unless the test itself begins to.

    The port stays bound: the kernel would give it to another test or process that asks for any, or as the port of a
    connection to itself. A server that names it gets it, because both have SO_REUSEADDR.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    _reserved.append(sock)
    return sock.getsockname()
