"""A target that says how long it keeps an idle connection gets no request that could cross with its close."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from time import monotonic

import pytest

from gmux.folder import Folder
from gmux.sharing import SharedSlots
from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.service import serving
from tests.support.target import Target, answer, in_turn
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


def test_time_that_the_target_does_not_repeat_is_not_kept_to():
    """The clock of its first word ended a connection that had just been used."""
    first = says(b"timeout=1")
    with Target(in_turn((first,)), framing=HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as client:
            for _ in range(2):
                assert ask(client) == b"it"
            clock = service.pool._limits[1.0]
            wait_until(lambda: not clock, what="the end of the clock")
            assert ask(client) == b"it"
        assert target.accepted == 1


@pytest.mark.parametrize("said", [b"max=5", b"timeout=60", b"timeout=60, max=5"])
def test_connection_of_which_the_target_said_something_is_not_handed_to_another_process(said, tmp_path):
    """Who gets it would not know: after `max` further requests it would send one too many."""
    with Target((says(said),), framing=HTTP) as target, ExitStack() as stack:
        services = [
            stack.enter_context(
                serving(
                    target, SharedSlots(Folder(tmp_path), "target", 1, "kind", logging.getLogger("gmux")), pool_min="0"
                )
            )
            for _ in range(2)
        ]
        for _ in range(3):
            for service in services:
                with Client(service.address, HTTP) as client:
                    assert ask(client) == b"it"
        assert {len(connection.requests) for connection in target.connections} == {1}
        assert target.peak == 1
