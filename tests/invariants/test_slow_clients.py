"""Clients that are slow to take their last answer: they get all of it while they take it, and no more time than that.

An answer may still be in gmux's spool, or in the kernel's send buffer, when gmux ends the connection. A reset, or a
close with bytes unread, destroys what is on its way.
"""

from __future__ import annotations

from collections.abc import Callable

import gevent
import pytest
from gevent import socket

from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.service import Service, serving
from tests.support.stream import Closed
from tests.support.target import Connection, Target
from tests.support.wait import PATIENCE, wait_until

#: More than the kernel takes for a client that reads nothing: gmux spools it.
SPOOLED = 8 << 20

#: What the kernel takes at once: gmux has nothing left to send. The slow client needs half a second for it.
SENT = 1 << 20

#: Seconds; short, so that a client of half a second is a slow one.
LINGER = 0.2

CLOSING = {
    "Connection: close": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
}
STAYING = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class BigTarget(Target):
    """Answers with `size` bytes; `sent` counts the answers that gmux has taken to the last byte, or all but."""

    def __init__(self, size: int) -> None:
        super().__init__(self._answer, HTTP)
        self.size = size
        self.sent = 0

    def _answer(self, connection: Connection, request: bytes) -> list[Callable[[Connection, bytes], None]]:
        return [self._send]

    def _send(self, connection: Connection, request: bytes) -> None:
        connection.send(HTTP.wrap(bytes(self.size)))
        self.sent += 1


def wait_taken(target: BigTarget, service: Service) -> None:
    """Until gmux has the whole answer."""
    wait_until(lambda: target.sent and service.is_whole, what="an answer that has left the target")


def size_of_body(client: Client, chunk: int = 1 << 20, pause: float = 0.0) -> int:
    """Bytes of the answer's body that come before the connection ends, read in no more than `chunk` at a time."""
    client.until(b"\r\n\r\n")
    size, client._held = len(client._held), b""
    while True:
        try:
            data = client.sock.recv(chunk)
        except OSError as error:
            raise AssertionError(f"broken off after {size} bytes: {error}") from None
        if not data:
            return size
        size += len(data)
        gevent.sleep(pause)


def slow_size(client: Client) -> int:
    """As `size_of_body`, within about half a second."""
    return size_of_body(client, SENT // 32, 0.5 / 32)


@pytest.fixture
def short_linger(monkeypatch):
    monkeypatch.setattr("gmux.client.LINGER_TIMEOUT", LINGER)
    monkeypatch.setattr("gmux.route.LINGER_TIMEOUT", LINGER, raising=False)


@pytest.mark.parametrize("request_", CLOSING.values(), ids=CLOSING)
def test_half_close_while_the_last_answer_is_spooled_client_gets_all(request_):
    with BigTarget(SPOOLED) as target, serving(target) as service, Client(service.address, HTTP, 64 << 10) as client:
        client.send_raw(request_)
        wait_taken(target, service)
        client.sock.shutdown(socket.SHUT_WR)
        assert size_of_body(client) == SPOOLED


@pytest.mark.parametrize("request_", CLOSING.values(), ids=CLOSING)
def test_half_close_before_the_answer_client_gets_all(request_):
    with BigTarget(SPOOLED) as target, serving(target) as service, Client(service.address, HTTP, 64 << 10) as client:
        client.send_raw(request_)
        client.sock.shutdown(socket.SHUT_WR)
        wait_taken(target, service)
        assert size_of_body(client) == SPOOLED


@pytest.mark.usefixtures("short_linger")
@pytest.mark.parametrize("request_", CLOSING.values(), ids=CLOSING)
def test_slow_client_last_answer_in_the_kernel_gets_all(request_):
    with BigTarget(SENT) as target, serving(target) as service, Client(service.address, HTTP, 16 << 10) as client:
        client.send_raw(request_)
        wait_taken(target, service)
        assert slow_size(client) == SENT


@pytest.mark.usefixtures("short_linger")
def test_slow_client_last_answer_spooled_gets_all():
    """The spool empties while the client reads; what the kernel has then takes longer than LINGER."""
    with BigTarget(SPOOLED) as target, serving(target) as service, Client(service.address, HTTP, 64 << 10) as client:
        client.send_raw(CLOSING["Connection: close"])
        wait_taken(target, service)
        assert size_of_body(client, 64 << 10, 0.004) == SPOOLED


@pytest.mark.usefixtures("short_linger")
def test_client_that_takes_nothing_of_its_last_answer_is_cut_off():
    settings = {"client_write_timeout": "300ms"}
    with (
        BigTarget(SENT) as target,
        serving(target, **settings) as service,
        Client(service.address, HTTP, 16 << 10) as client,
    ):
        client.send_raw(CLOSING["Connection: close"])
        wait_taken(target, service)
        service.wait_clients(0)
        with pytest.raises(Closed):
            client.exactly(SENT)


@pytest.mark.usefixtures("short_linger")
def test_drain_slow_client_gets_all():
    with BigTarget(SENT) as target, serving(target) as service, Client(service.address, HTTP, 16 << 10) as client:
        client.send_raw(STAYING)
        wait_taken(target, service)
        draining = gevent.spawn(service.route.drain, PATIENCE)
        assert slow_size(client) == SENT
        client.sock.close()
        assert draining.get(timeout=PATIENCE)


@pytest.mark.usefixtures("short_linger")
def test_drain_client_that_takes_nothing_is_cut_off():
    settings = {"client_write_timeout": "300ms"}
    with (
        BigTarget(SENT) as target,
        serving(target, **settings) as service,
        Client(service.address, HTTP, 16 << 10) as client,
    ):
        client.send_raw(STAYING)
        wait_taken(target, service)
        draining = gevent.spawn(service.route.drain, 2 * PATIENCE)
        service.wait_clients(0)
        draining.get(timeout=PATIENCE)
