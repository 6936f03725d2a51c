"""A load generator: clients that ask again as soon as they have their answer, and take no answer but their own."""

from __future__ import annotations

import math
import multiprocessing
import os
import select
import signal
import socket
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter

from loadtest.figures import quantile
from loadtest.processes import PATIENCE, ProcessFailed
from loadtest.protocols import PROTOCOLS, BadAnswer, Protocol, WrongAnswer

#: Part of the time that is left out of the figures: connections are made, and code is run for the first time.
WARMUP = 0.1

#: Seconds that a connection may take.
CONNECT_PATIENCE = 5.0

#: A generator that has seen so many ends: nobody answers, and it would only make connections.
MAX_ERRORS = 1000


@dataclass
class Load:
    """What a load has seen: in all, and without the warm-up requests a second and answer times in microseconds."""

    requests: int
    #: None when the generator does not look.
    wrong: int | None
    errors: int
    rate: float
    p50: float
    p99: float


@dataclass
class Share:
    """What one process of a load has seen."""

    requests: int = 0
    wrong: int = 0
    errors: int = 0
    rate: float = 0.0
    times: list[float] = field(default_factory=list)


def processes(clients: int) -> int:
    """How many processes, or threads of wrk, load with so many clients: the other half is for target and proxy."""
    return max(1, min(clients, len(os.sched_getaffinity(0)) // 2))


def run(protocol: Protocol, address: str, clients: int, seconds: float) -> Load:
    """Load `address`, HOST:PORT, with several processes. Raises ProcessFailed."""
    host, _, port = address.rpartition(":")
    shares = processes(clients)
    jobs = [(protocol.name, (host, int(port)), range(n, clients, shares), seconds) for n in range(shares)]
    with multiprocessing.get_context("fork").Pool(shares, _leave_signals_to_parent) as pool:
        try:
            seen = pool.starmap_async(_work, jobs).get(seconds + PATIENCE)
        except multiprocessing.TimeoutError:
            raise ProcessFailed(f"a process of the load did not end within {seconds + PATIENCE:g} s") from None
    times = [time for share in seen for time in share.times]
    return Load(
        sum(share.requests for share in seen),
        sum(share.wrong for share in seen),
        sum(share.errors for share in seen),
        sum(share.rate for share in seen),
        quantile(times, 0.5) or math.nan,
        quantile(times, 0.99) or math.nan,
    )


def _leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(name: str, address: tuple[str, int], numbers: range, seconds: float) -> Share:
    return Generator(PROTOCOLS[name], address).run(numbers, seconds)


@dataclass
class Client:
    number: int
    sock: socket.socket
    request: bytes = b""
    began: float = 0.0
    buffer: bytearray = field(default_factory=bytearray)


class Generator:
    """The clients of one process, on one epoll."""

    def __init__(self, protocol: Protocol, address: tuple[str, int]) -> None:
        self._protocol = protocol
        self._address = address
        self._numbers = count(1)
        self._clients: dict[int, Client] = {}
        self._share = Share()

    def run(self, numbers: range, seconds: float) -> Share:
        began = perf_counter()
        warm, end = began + WARMUP * seconds, began + seconds
        share = self._share
        with select.epoll() as self._poll:
            for number in numbers:
                self._connect(number)
            while (left := end - perf_counter()) > 0 and self._clients and share.errors < MAX_ERRORS:
                for descriptor, _ in self._poll.poll(left):
                    self._serve(self._clients[descriptor], warm)
        for client in self._clients.values():
            client.sock.close()
        share.rate = len(share.times) / (end - warm)
        return share

    def _serve(self, client: Client, warm: float) -> None:
        """Take what has come, and ask anew when it is the answer; a connection that fails is made again."""
        share = self._share
        try:
            answer = self._receive(client)
            if answer is None:
                return
            now = perf_counter()
            self._protocol.check(client.request, answer)
            share.requests += 1
            if now > warm:
                share.times.append((now - client.began) * 1e6)
            self._ask(client)
            return
        except WrongAnswer:
            share.wrong += 1
        except (OSError, BadAnswer):
            share.errors += 1
        del self._clients[client.sock.fileno()]
        client.sock.close()
        self._connect(client.number)

    def _receive(self, client: Client) -> bytes | None:
        """The answer; None when it is not whole yet. Raises OSError, BadAnswer."""
        data = client.sock.recv(65536)
        if not data:
            raise BadAnswer("closed without an answer")
        client.buffer += data
        answer = self._protocol.cut(client.buffer)
        if answer is not None and client.buffer:
            raise BadAnswer("more than one answer")
        return answer

    def _ask(self, client: Client) -> None:
        client.request = self._protocol.request(client.number, next(self._numbers))
        client.began = perf_counter()
        client.sock.sendall(client.request)

    def _connect(self, number: int) -> None:
        try:
            sock = socket.create_connection(self._address, CONNECT_PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = self._clients[sock.fileno()] = Client(number, sock)
            self._poll.register(sock, select.EPOLLIN)
            self._ask(client)
        except OSError:
            self._share.errors += 1
