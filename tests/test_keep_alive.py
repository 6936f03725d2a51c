"""A target that says how long it keeps an idle connection gets no request that could cross with its close."""

from __future__ import annotations

from contextlib import ExitStack
from time import monotonic

from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.service import serving
from tests.support.target import Target, answer
from tests.support.wait import wait_until

REQUEST = b"GET /it HTTP/1.1\r\nHost: a\r\n\r\n"


def says(value: bytes):
    """A step: the answer, with this Keep-Alive."""

    def step(connection, request):
        first, end, rest = connection.target.framing.answer(request).partition(b"\r\n")
        connection.send(first + end + b"Keep-Alive: " + value + end + rest)

    return step


def ask(client: Client) -> bytes:
    client.send_raw(REQUEST)
    return HTTP.payload(HTTP.read(client))


def test_connection_idle_is_closed_before_the_target_closes_it():
    """Half of a time below two seconds; a new one is opened at once, where one is to be kept."""
    with Target((says(b"timeout=1"),), framing=HTTP) as target, serving(target) as service, ExitStack() as stack:
        client = stack.enter_context(Client(service.address, HTTP))
        assert ask(client) == b"it"
        answered = monotonic()
        wait_until(lambda: target.accepted == 2)
        assert monotonic() - answered > 0.3
        assert target.peak == 1
        assert ask(client) == b"it"


def test_connection_in_use_is_kept_beyond_that_time():
    with Target((says(b"timeout=1"),), framing=HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as client:
            end = monotonic() + 1.2
            while monotonic() < end:
                assert ask(client) == b"it"
        assert target.accepted == 1


def test_connection_that_takes_so_many_requests_gets_no_more():
    with Target((says(b"timeout=60, max=2"),), framing=HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as client:
            for _ in range(9):
                assert ask(client) == b"it"
        assert target.accepted >= 3
        assert max(len(connection.requests) for connection in target.connections) == 3
        assert target.peak == 1


def test_connection_that_is_kept_for_less_than_the_request_delay_is_not_used_again():
    settings = {"request_delay": "2s"}
    with Target((says(b"timeout=1"),), framing=HTTP) as target, serving(target, **settings) as service:
        with Client(service.address, HTTP) as client, Client(service.address, HTTP) as other:
            client.send_raw(REQUEST)
            other.send_raw(REQUEST)
            for one in (client, other):
                assert HTTP.payload(HTTP.read(one)) == b"it"
        assert max(len(connection.requests) for connection in target.connections) == 1


def test_answer_of_a_target_that_says_nothing_keeps_the_connection():
    with Target((answer,), framing=HTTP) as target, serving(target) as service, Client(service.address, HTTP) as client:
        for _ in range(3):
            assert ask(client) == b"it"
        assert not service.pool._limits
        assert target.accepted == 1
