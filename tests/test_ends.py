"""A client that is gone is noticed while it is not read, and its request goes nowhere."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from gevent import socket
from gevent.lock import Semaphore

from tests.support.clients import Client
from tests.support.service import serving
from tests.support.target import Target, answer, hold
from tests.support.wait import wait_until

#: More than gmux reads ahead of a request, and not more than the kernel takes beside.
AHEAD = b"ahead\n" * 30_000


@pytest.fixture(params=["tcp", "unix"])
def where(request, tmp_path):
    return {} if request.param == "tcp" else {"listen": f"unix:{tmp_path}/gmux"}


def test_client_that_is_gone_while_it_is_not_read_leaves_the_queue(where):
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target, **where))
        first = stack.enter_context(Client(service.address))
        first.send(b"first")
        wait_until(lambda: target.requests)
        dead = [Client(service.address) for _ in range(5)]
        for client in dead:
            client.flood(b"dead\n" + AHEAD, 1)
        wait_until(lambda: service.waiting == 5 and not any(c._is_reading for c in service.clients if c.name[1] != "1"))
        for client in dead:
            client.reset()
        service.wait_clients(1)
        assert service.waiting == 0
        gate.release()
        assert first.receive() == b"first"
        gate.release()
        assert first.ask(b"next") == b"next"
        assert target.requests == [b"first", b"next"]


def test_client_that_sends_no_more_and_is_gone_while_it_waits_leaves_the_queue(where):
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target, **where))
        first, half, gone = (stack.enter_context(Client(service.address)) for _ in range(3))
        first.send(b"first")
        wait_until(lambda: target.requests)
        for client, name in ((half, b"half"), (gone, b"gone")):
            client.send(name)
            client.sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: service.waiting == 2 and sum(c._is_half for c in service.clients) == 2)
        gone.reset()
        service.wait_clients(2)
        gate.release()
        gate.release()
        assert first.receive() == b"first"
        # It has only said that it sends no more.
        assert half.receive() == b"half"
        assert target.requests == [b"first", b"half"]
