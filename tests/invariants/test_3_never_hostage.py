"""Invariant 3: what a client does never makes an upstream connection wait."""

from __future__ import annotations

from contextlib import ExitStack

import gevent
import pytest
from gevent.lock import Semaphore

from tests.support.clients import Client, tagged
from tests.support.framing import ISO8583, LINE
from tests.support.service import serving
from tests.support.target import Target, answer, hold, in_turn, padded, pause
from tests.support.wait import PATIENCE, wait_until

MEGABYTE = 1 << 20

#: Seconds for 200 requests of another client; unhindered they take a tenth of a second, on a machine with nothing else
#: to do. A client that hinders them does so for ever, or for the 30 s of `request-timeout`.
GENEROUS = 15.0


def assert_served(service, framing=LINE):
    """Another client gets 200 answers in good time."""
    late = AssertionError("200 requests were not served in time")
    with gevent.Timeout(GENEROUS, late), Client(service.address, framing) as other:
        for n in range(200):
            assert other.ask(tagged(2, n)) == tagged(2, n)


def big_for(client):
    """Megabytes for requests that begin with `client`."""
    return lambda connection, request: (padded(8 * MEGABYTE) if request.startswith(client) else answer,)


@pytest.mark.parametrize("framing", [LINE, ISO8583], ids=str)
def test_client_stuck_in_its_request_others_are_served(framing):
    with Target(framing=framing) as target, serving(target) as service:
        stuck = [Client(service.address, framing) for _ in range(50)]
        for client in stuck:
            client.send_half(b"slow request")
        assert_served(service, framing)
        assert not [request for request in target.requests if b"slow" in request]
        for client in stuck:
            client.send_raw(framing.wrap(b"slow request")[len(framing.wrap(b"slow request")) // 2 :])
            assert client.receive() == b"slow request"
            client.sock.close()


def test_client_sending_byte_by_byte_others_are_served():
    with Target() as target, serving(target) as service, Client(service.address) as slow:
        payload = b"slow".ljust(5000, b".")
        dripping = gevent.spawn(slow.drip, payload)
        assert_served(service)
        dripping.get(timeout=PATIENCE)
        assert slow.receive() == payload


def test_client_that_never_reads_others_are_served():
    with ExitStack() as stack:
        target = stack.enter_context(Target(big_for(b"slow")))
        service = stack.enter_context(serving(target))
        slow = stack.enter_context(Client(service.address, receive_buffer=4096))
        slow.send(b"slow")
        wait_until(lambda: target.requests)
        assert_served(service)
        slow.reset()


def test_client_that_reads_late_gets_the_whole_answer():
    with ExitStack() as stack:
        target = stack.enter_context(Target(big_for(b"slow")))
        service = stack.enter_context(serving(target))
        slow = stack.enter_context(Client(service.address, receive_buffer=4096))
        slow.send(b"slow")
        slow.send(b"next")
        wait_until(lambda: target.requests and service.is_whole, what="the answer to be off the connection")
        assert slow.receive() == b"slow".ljust(8 * MEGABYTE, b".")
        assert slow.receive() == b"next"


def test_many_clients_that_never_read_others_are_served():
    with Target(big_for(b"slow")) as target, serving(target) as service:
        slow = [Client(service.address, receive_buffer=4096) for _ in range(5)]
        for client in slow:
            client.send(b"slow")
        wait_until(lambda: len(target.requests) == 5)
        assert_served(service)
        assert service.held <= 5 * service.config.spool_memory
        for client in slow:
            client.reset()


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_clients_vanish_in_flight_others_are_served(how):
    with Target(in_turn(*[(pause(0.002), answer)] * 30)) as target, serving(target) as service:
        gone = [Client(service.address) for _ in range(30)]
        for client in gone:
            client.send(b"gone")
        wait_until(lambda: target.requests)
        for client in gone:
            client.vanish(how)
        assert_served(service)
        assert target.accepted == 1


def test_client_vanishes_while_waiting_its_request_is_not_sent():
    """Only a reset says so: a FIN may be that of a client that still waits for its answer."""
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, serving(target) as service:
        with Client(service.address) as first, Client(service.address) as second:
            first.send(b"first")
            wait_until(lambda: target.requests)
            second.send(b"second")
            wait_until(lambda: service.waiting)
            second.vanish("reset")
            wait_until(lambda: not service.waiting)
            gate.release()
            assert first.receive() == b"first"
        assert target.requests == [b"first"]
