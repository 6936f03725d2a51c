"""Invariant 7: first come, first served over clients; who pipelines gets one turn like any other.

The target holds each answer until the test lets it go, so the order is the pool's and not the clock's.
"""

from __future__ import annotations

from contextlib import ExitStack

import gevent
import pytest
from gevent.lock import Semaphore

from tests.support.clients import Client, tagged, untag
from tests.support.service import serving
from tests.support.target import Target, answer, close, hold, reset
from tests.support.wait import wait_until


def test_single_request_waits_for_one_of_a_thousand_pipelined():
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target))
        many, single = (stack.enter_context(Client(service.address)) for _ in range(2))
        many.pipeline(tagged(1, n) for n in range(1000))
        wait_until(lambda: target.requests)
        for n in range(20):
            # One of the thousand is in flight; no other of them is before the single request.
            single.send(tagged(2, n))
            wait_until(lambda: service.waiting == 1)
            before = len(target.requests)
            gate.release()
            wait_until(lambda before=before: len(target.requests) > before)
            assert target.requests[-1] == tagged(2, n)
            gate.release()
            assert single.receive() == tagged(2, n)
            wait_until(lambda before=before: len(target.requests) > before + 1)
        assert [untag(request)[0] for request in target.requests] == [1, 2] * 20 + [1]
        for _ in range(1000 - 20):
            gate.release()
        for n in range(1000):
            assert many.receive() == tagged(1, n)


@pytest.mark.parametrize("settings", [{}, {"pipeline": "4"}], ids=["strict", "pipelined"])
def test_requests_of_one_turn_are_queued_in_the_order_of_connecting_then_of_being_served(settings, monkeypatch):
    """All are written before the loop looks at any: libev alone would have them in reverse."""
    # On a busy machine any of them may take long, and would be served later the next time.
    monkeypatch.setattr("gmux.scheduler.LONG_STEP", 60.0)
    gate = Semaphore(0)
    number = 20
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target, **settings))
        clients = [stack.enter_context(Client(service.address)) for _ in range(number)]
        service.wait_clients(number)
        in_flight = int(settings.get("pipeline", 1))
        for turn in range(3):
            before = len(target.requests)
            for place in range(number):
                clients[(7 * place + turn) % number].send(tagged((7 * place + turn) % number, turn))
            wait_until(lambda: service.waiting == number - in_flight)
            for _ in range(number):
                gate.release()
            for client_number, client in enumerate(clients):
                assert client.receive() == tagged(client_number, turn)
            order = [untag(request)[0] for request in target.requests[before:]]
            assert order == list(range(number))


def test_waiting_requests_are_served_first_come_first_served():
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target))
        clients = [stack.enter_context(Client(service.address)) for _ in range(20)]
        order = [(7 * n) % 20 for n in range(20)]
        for place, number in enumerate(order):
            clients[number].send(tagged(number, 0))
            wait_until(lambda place=place: target.requests and service.waiting == place)
        for _ in order:
            gate.release()
        for number, client in enumerate(clients):
            assert client.receive() == tagged(number, 0)
        assert [untag(request)[0] for request in target.requests] == order


def test_clients_that_all_pipeline_take_turns():
    gate = Semaphore(0)
    users, each = 5, 40
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target))
        clients = [stack.enter_context(Client(service.address)) for _ in range(users)]
        for number, client in enumerate(clients):
            client.pipeline(tagged(number, n) for n in range(each))
            wait_until(lambda number=number: target.requests and service.waiting == number)
        for _ in range(users * each):
            gate.release()
        for number, client in enumerate(clients):
            assert [client.receive() for _ in range(each)] == [tagged(number, n) for n in range(each)]
        assert [untag(request)[0] for request in target.requests] == list(range(users)) * each


@pytest.mark.parametrize("end", [close, reset], ids=["close", "reset"])
def test_first_in_line_when_the_connection_ends_keeps_its_place(end):
    """The end comes right behind an answer, so the next in line meets it, and goes on another connection."""
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer, end)))
        service = stack.enter_context(serving(target))
        clients = [stack.enter_context(Client(service.address)) for _ in range(6)]
        for number, client in enumerate(clients):
            client.send(tagged(number, 0))
            wait_until(lambda number=number: target.requests and service.waiting == number)
        for _ in clients:
            gate.release()
        for number, client in enumerate(clients):
            assert client.receive() == tagged(number, 0)
        assert [untag(request)[0] for request in target.requests] == list(range(6))


def test_single_requests_of_many_clients_under_a_pipeliner_are_served():
    with Target() as target, serving(target) as service, Client(service.address) as many:
        many.pipeline(tagged(1, n) for n in range(1000))

        def use(number):
            with Client(service.address) as client:
                assert client.outcome(tagged(number, 0)) == "answered"

        gevent.joinall([gevent.spawn(use, number) for number in range(2, 22)], raise_error=True)
        # They were answered in the middle of the thousand, not behind it.
        assert len(target.requests) < 500
        for n in range(1000):
            assert many.receive() == tagged(1, n)
