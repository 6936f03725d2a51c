"""The end of the service: what TERM, INT and QUIT leave of it, for clients and for the next gmux."""

from __future__ import annotations

import signal
from contextlib import ExitStack, contextmanager
from time import monotonic

import pytest
from gevent import socket
from gevent.lock import Semaphore

import gmux.pool
from gmux.net import format_address
from tests.support.clients import Client
from tests.support.service import Server, Service
from tests.support.target import Target, answer, closed_port, hold
from tests.support.wait import PATIENCE, wait_until


@contextmanager
def request_under_way():
    """A server with one request at its target, the client, and what lets the target answer."""
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        # Its port stays reserved for the one that comes after it.
        server = stack.enter_context(Server(target, listen=format_address(closed_port())))
        client = stack.enter_context(Client(server.address))
        client.send(b"request")
        wait_until(lambda: target.requests)
        yield server, client, gate


def test_term_while_a_request_is_under_way_frees_the_port_at_once():
    with request_under_way() as (server, client, gate):
        server.signal(signal.SIGTERM)

        def is_refused() -> bool:
            try:
                socket.create_connection(server.address, PATIENCE).close()
            except ConnectionRefusedError:
                return True
            except ConnectionResetError:
                return False  # it was in the backlog as the port was closed: ask again
            return False

        wait_until(is_refused)
        where = format_address(server.address)
        with Target() as other, Server(other, listen=where) as successor, Client(successor.address) as new:
            assert new.ask(b"new") == b"new"
        gate.release()
        assert client.receive() == b"request"
        assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_signal_to_stop_at_once_tells_what_is_lost(number):
    with request_under_way() as (server, client, _):
        server.signal(number)
        assert server.wait() == 0
        assert client.outcome(b"") == "closed"
        assert server.said("stopped at once; 1 requests get no answer")


def test_stop_before_the_first_step_of_a_new_connection_leaves_nothing_and_does_not_wait(monkeypatch):
    # What a stop waits for at most: long, so that a wait is told from a busy machine.
    monkeypatch.setattr(gmux.pool, "CLOSE_TIMEOUT", 30.0)
    with Target() as target:
        service = Service((target.server_host, target.server_port), None, {})
        service.route.start()
        begin = monotonic()
        service.route.drain(0.05)
        assert monotonic() - begin < 10
        assert not service.pool._connecting
        assert not target.accepted
