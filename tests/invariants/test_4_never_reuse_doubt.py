"""Invariant 4: an upstream connection whose state is not certain is closed; when only the client is gone it stays."""

from __future__ import annotations

import pytest

import gmux.pool
from tests.support.clients import Client
from tests.support.framing import ISO8583, LINE, MPU
from tests.support.service import serving
from tests.support.target import Target, answer, bytewise, garbage, half, hang, in_turn, never, pause, rest, send, twice
from tests.support.wait import wait_until

#: For tests in which one request meets it and others must not, however busy the machine.
TIMEOUT = "500ms"

#: Steps, and what their client gets.
DOUBTS = {
    "never": (never, "closed"),
    "late": ((pause(0.7), answer), "closed"),
    "half then silence": ((half,), "closed"),
    "garbage": ((garbage,), "closed"),
    "twice": ((twice,), "answered"),
    "answer and a piece of another": ((lambda c, r: c.send(c.target.framing.answer(r) + b"0"),), "answered"),
}


@pytest.mark.parametrize(("steps", "outcome"), DOUBTS.values(), ids=DOUBTS)
def test_connection_in_doubt_is_closed(steps, outcome):
    with Target(in_turn(steps), MPU) as target, serving(target, timeout=TIMEOUT) as service:
        with Client(service.address, MPU) as client:
            assert client.outcome(b"doubt") == outcome
        wait_until(lambda: not target.connections[0].is_open)
        with Client(service.address, MPU) as client:
            assert client.outcome(b"next") == "answered"
        assert target.accepted == 2
        assert target.peak == 1


def test_connection_answers_byte_by_byte_stays():
    with Target((bytewise,)) as target, serving(target) as service, Client(service.address) as client:
        for _ in range(10):
            assert client.ask(b"request") == b"request"
        assert target.accepted == 1


@pytest.mark.parametrize("framing", [LINE, ISO8583, MPU], ids=str)
def test_connection_idle_with_unsolicited_bytes_is_closed(framing):
    with Target(framing=framing) as target, serving(target) as service, Client(service.address, framing) as client:
        assert client.ask(b"first") == b"first"
        target.say(framing.wrap(b"news"))
        wait_until(lambda: target.accepted == 2)
        assert client.ask(b"second") == b"second"


def test_connection_idle_with_keepalive_polls_stays():
    """jPOS channels send an empty frame; it is a part of the hop and answers nothing."""
    with Target(framing=ISO8583) as target, serving(target) as service, Client(service.address, ISO8583) as client:
        for _ in range(5):
            assert client.ask(b"request") == b"request"
            target.say(b"\0\0\0\0")
        assert target.accepted == 1


def test_connection_with_greeting_is_not_used():
    """Who says hello first does not speak this protocol. A pause before the first request is what finds it out."""
    # The delay ends when the greeting comes, and must not be over before.
    settings = {"connect_delay": "5s", "queue_timeout": "6s"}
    with Target(greeting=(send(b"hello\n"),)) as target, serving(target, **settings) as service:
        with Client(service.address) as client:
            assert client.outcome(b"request") == "closed"
        wait_until(lambda: target.accepted > 1)
        assert target.peak == 1
        assert target.requests == []


def test_connection_request_partly_written_is_closed():
    with Target(greeting=(hang,)) as target, serving(target, timeout=TIMEOUT) as service:
        with Client(service.address) as client:
            assert client.outcome(b"big".ljust(12 << 20, b".")) == "closed"
        assert service.connected == 1
        target.greeting = ()
        target.released.set()
        wait_until(lambda: not target.connections[0].is_open)
        with Client(service.address) as client:
            assert client.outcome(b"next") == "answered"
        assert target.connections[0].requests == []


def test_connection_answer_before_the_whole_request_is_closed():
    with Target(greeting=(lambda c, r: c.exactly(10), send(b"no\n"), hang)) as target, serving(target) as service:
        with Client(service.address) as client:
            client.send(b"big".ljust(12 << 20, b"."))
            assert client.receive() == b"no"
        assert not service.pool._idle
        target.greeting = ()
        target.released.set()
        with Client(service.address) as client:
            assert client.ask(b"next") == b"next"
        assert target.accepted == 2


def test_connection_big_request_wholly_written_stays():
    with Target() as target, serving(target) as service, Client(service.address) as client:
        for n in range(5):
            payload = str(n).encode().ljust(6 << 20, b".")
            assert client.ask(payload) == payload
        assert target.accepted == 1


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("steps", [(pause(0.01), answer), (half, pause(0.01), rest)])
def test_connection_client_gone_in_flight_stays(steps, how):
    with Target(in_turn(*[steps] * 5)) as target, serving(target) as service:
        for n in range(5):
            with Client(service.address) as client:
                client.send(b"abcd")
                wait_until(lambda n=n: len(target.requests) == n + 1)
                client.vanish(how)
        with Client(service.address) as client:
            assert client.ask(b"own") == b"own"
        assert target.accepted == 1


def test_connection_client_gone_and_answer_endless_is_closed(monkeypatch):
    monkeypatch.setattr(gmux.pool, "DISCARD_TIMEOUT", 0.03)
    with Target(in_turn((half,))) as target, serving(target) as service:
        with Client(service.address) as client:
            client.send(b"request")
            wait_until(lambda: target.requests)
            client.vanish("reset")
        with Client(service.address) as client:
            assert client.ask(b"next") == b"next"
        assert target.accepted == 2


def test_connection_target_that_does_not_close_is_cut_off(monkeypatch):
    """A device that hangs would hold its place for ever; it gets a reset."""
    monkeypatch.setattr(gmux.pool, "CLOSE_TIMEOUT", 0.05)
    with Target(in_turn((hang,))) as target, serving(target, timeout=TIMEOUT) as service:
        with Client(service.address) as client:
            assert client.outcome(b"request") == "closed"
        with Client(service.address) as client:
            assert client.outcome(b"next") == "answered"
        target.released.set()
        wait_until(lambda: not target.connections[0].is_open)


def test_client_garbage_never_reaches_the_target():
    with Target(framing=MPU) as target, serving(target) as service:
        for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\0", b"+001x", b"12 4"):
            with Client(service.address, MPU) as client:
                client.send_raw(junk)
                client.receive_end()
        with Client(service.address, MPU) as client:
            client.send(b"good")
            client.send_raw(b"junk")
            assert client.receive() == b"good"
            client.receive_end()
        assert target.requests == [b"good"]
        assert target.accepted == 1


def test_target_of_another_protocol_clients_get_closed():
    with (
        Target((send(b"HTTP/1.1 400 Bad Request\r\n\r\n"),), LINE) as target,
        serving(target, protocol="mpu", timeout="50ms") as service,
        Client(service.address, MPU) as client,
    ):
        assert client.outcome(b"12\n") == "closed"
