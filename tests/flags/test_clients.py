"""The flags of the clients: how many, how large, how slow, and how much is held for them."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest

from tests.flags.support import MEGABYTE, ask_http, receive_http, send_http
from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.service import Server, spool_bytes
from tests.support.stream import Closed
from tests.support.target import Target, in_turn, padded
from tests.support.wait import wait_until

#: More than the kernel's buffers take for a client that reads nothing, so that gmux must hold most of it.
MUCH = 12 * MEGABYTE


def slow_client(server: Server) -> Client:
    """A client that asks for MUCH and reads nothing of it."""
    client = Client(server.address, receive_buffer=4096)
    client.send(b"much")
    return client


def test_max_clients_two_refuses_the_third_until_one_leaves():
    with Target(framing=HTTP) as target, Server(target, max_clients="2") as server, ExitStack() as stack:
        first, second = (stack.enter_context(Client(server.address, HTTP)) for _ in range(2))
        for client in (first, second):
            send_http(client)
            assert receive_http(client)[0] == 200
        assert ask_http(server) == (503, "gmux: 2 clients are connected (--max-clients)\n")
        wait_until(lambda: len([line for line in server.log if "closed: " in line]) == 1)
        second.fin()
        wait_until(lambda: len([line for line in server.log if "closed: " in line]) == 2)
        assert ask_http(server)[0] == 200


def test_max_message_of_its_size_goes_on_and_one_byte_more_is_refused():
    with Target(framing=HTTP) as target, Server(target, max_message="1k") as server:
        assert ask_http(server, b"." * 1024)[0] == 200
        assert ask_http(server, b"." * 1025) == (
            413,
            "gmux: a body of 1025 bytes is longer than 1024 (--max-message)\n",
        )
        assert len(target.requests) == 1


def test_request_timeout_over_is_told_as_408():
    with ExitStack() as stack:
        target = stack.enter_context(Target(framing=HTTP))
        server = stack.enter_context(Server(target, request_timeout="200ms"))
        late, half = (stack.enter_context(Client(server.address, HTTP)) for _ in range(2))
        half.send_raw(b"GET / HTTP/1.1\r\n")
        assert receive_http(half) == (408, "gmux: the request was not complete within 0.2 s (--request-timeout)\n")
        # It runs from the first byte: a client without a request has as long as it likes.
        send_http(late)
        assert receive_http(late)[0] == 200


def test_client_idle_timeout_over_ends_the_client_before_and_after_a_request():
    # Long enough for a request to come before, however busy the machine.
    with Target() as target, Server(target, client_idle_timeout="1s") as server:
        with Client(server.address) as silent, Client(server.address) as client:
            assert client.ask(b"request") == b"request"
            client.receive_end()
            silent.receive_end()
        assert target.open == 1


def test_client_write_timeout_over_ends_a_client_that_takes_nothing():
    with Target(in_turn((padded(MUCH),))) as target, Server(target, client_write_timeout="200ms") as server:
        with slow_client(server) as client:
            wait_until(lambda: server.said("the client took nothing of its answer for 0.2 s"))
            # Half an answer must not look like a whole one.
            with pytest.raises(Closed, match="reset"):
                client.receive()
        assert target.accepted == 1


def test_spool_memory_answer_below_it_needs_no_file():
    """That a file would be seen is shown by `test_memory_limit_answer_above_it_goes_to_disk`."""
    with ExitStack() as stack:
        target = stack.enter_context(Target(in_turn((padded(MUCH),))))
        server = stack.enter_context(Server(target, spool_memory="64M"))
        stack.enter_context(slow_client(server))
        wait_until(lambda: target.requests)
        with Client(server.address) as other:
            assert other.ask(b"next") == b"next"  # so the answer before it is with gmux, all of it
        (worker,) = server.workers()
        assert spool_bytes(worker) == 0


def test_spool_limit_exceeded_ends_the_slow_client_alone():
    with Target(in_turn((padded(MUCH),))) as target, Server(target, spool_limit="1M") as server:
        with slow_client(server) as client, Client(server.address) as other:
            wait_until(lambda: server.said("more than 1048576 bytes are held"))
            assert other.ask(b"next") == b"next"
            with pytest.raises(Closed, match="reset"):
                client.receive()
        assert target.accepted == 1


def test_memory_limit_is_for_all_clients_together():
    """Two unfinished requests, of which only one fits into half of it: one client goes, the other is served."""
    part = b"." * 400 * 1024
    with Target() as target, Server(target, memory_limit="1M") as server, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(2)]
        for client in clients:
            client.send_raw(part)
        wait_until(lambda: server.said("clients hold 1048576 bytes of memory (--memory-limit)"))

        def finish(client: Client) -> bytes:
            with suppress(Closed):
                client.send_raw(b"\n")
                return client.receive()
            return b""

        assert sorted(map(finish, clients)) == [b"", part]
        assert target.requests == [part]


def test_memory_limit_answer_above_it_goes_to_disk():
    settings = {"memory_limit": "1M", "spool_memory": "64M"}
    with Target(in_turn((padded(MUCH),))) as target, Server(target, **settings) as server, slow_client(server):
        wait_until(lambda: target.requests)
        (worker,) = server.workers()
        wait_until(lambda: spool_bytes(worker))
