"""Invariant 8: memory, clients, queue length and message size have limits; past one the client ends, not gmux."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest
from gevent.lock import Semaphore

import gmux.client
from gmux.listener import max_lingering
from gmux.memory import SMALL
from tests.support.clients import Client, tagged
from tests.support.framing import LINE, MPU
from tests.support.service import Server, resident_bytes, serving, spool_bytes
from tests.support.stream import Closed
from tests.support.target import Target, answer, hold, in_turn, never, padded, pause, send
from tests.support.wait import wait_until

MEGABYTE = 1 << 20


def assert_goes_on(service, framing=LINE):
    with Client(service.address, framing) as client:
        assert client.ask(b"still there") == b"still there"


def test_clients_past_max_clients_get_an_end():
    with Target() as target, serving(target, max_clients="3") as service, ExitStack() as stack:
        clients = [stack.enter_context(Client(service.address)) for _ in range(3)]
        for client in clients:
            assert client.ask(b"inside") == b"inside"
        for _ in range(10):
            with Client(service.address) as late:
                late.receive_end()
        assert clients[0].ask(b"inside") == b"inside"
        clients.pop().sock.close()
        service.wait_clients(2)
        assert_goes_on(service)


def test_clients_refused_that_stay_take_no_place():
    with Target() as target, serving(target, max_clients="2") as service, ExitStack() as stack:
        first, second = (stack.enter_context(Client(service.address)) for _ in range(2))
        assert first.ask(b"first") == b"first"
        assert second.ask(b"second") == b"second"
        for _ in range(3):
            # It is told to go, and does not close its side.
            stack.enter_context(Client(service.address)).receive_end()
        first.sock.close()
        wait_until(lambda: len(service.clients) <= 4)
        assert_goes_on(service)


def test_clients_told_to_go_that_stay_make_way_for_others():
    """They may be many more than those that may linger; who comes is served all the same."""
    with Target() as target, serving(target, max_message="100", max_clients="4") as service, ExitStack() as stack:
        served = stack.enter_context(Client(service.address))
        assert served.ask(b"first") == b"first"
        for n in range(3 * (4 + max_lingering(4))):
            bad = stack.enter_context(Client(service.address))
            bad.send_raw(b"." * 200)
            bad.receive_end()
            if n % 10 == 9:
                assert_goes_on(service)
        assert len(service.clients) <= 4 + max_lingering(4)
        assert served.ask(b"again") == b"again"


def test_requests_past_queue_limit_get_an_end():
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target, queue_limit="5"))
        clients = [stack.enter_context(Client(service.address)) for _ in range(10)]
        clients[0].send(tagged(0, 0))
        wait_until(lambda: target.requests)
        for number, client in enumerate(clients[1:6], 1):
            client.send(tagged(number, 0))
            wait_until(lambda number=number: service.waiting == number)
        for client in clients[6:]:
            client.send(b"too many")
            client.receive_end()
        for number, client in enumerate(clients[:6]):
            gate.release()
            assert client.receive() == tagged(number, 0)


@pytest.mark.parametrize("how", ["whole", "unfinished", "behind another"])
def test_request_larger_than_max_message_gets_an_end(how):
    with Target() as target, serving(target, max_message="10k") as service, Client(service.address) as client:
        if how == "behind another":
            assert client.ask(b"small") == b"small"
        client.send_raw(b"." * 11_000 + (b"" if how == "unfinished" else b"\n"))
        client.receive_end()
        assert set(target.requests) <= {b"small"}
        assert_goes_on(service)
        assert target.accepted == 1


def test_request_header_announces_more_than_max_message_gets_an_end():
    """The length is checked before the bytes come."""
    with Target(framing=MPU) as target, serving(target, max_message="5000") as service:
        with Client(service.address, MPU) as client:
            client.send_raw(b"5001")
            client.receive_end()
        assert_goes_on(service, MPU)


def test_answer_larger_than_max_message_ends_its_connection():
    with Target(in_turn((padded(20_000),))) as target, serving(target, max_message="10k") as service:
        with Client(service.address) as client:
            assert client.outcome(b"request") == "closed"
        assert_goes_on(service)
        assert target.accepted == 2


def test_unfinished_requests_past_memory_limit_get_an_end():
    with Target() as target, serving(target, memory_limit="4M") as service, ExitStack() as stack:
        clients = [stack.enter_context(Client(service.address)) for _ in range(12)]
        for client in clients:
            client.flood(b"." * 65536, MEGABYTE)
        assert service.held <= 4 * MEGABYTE
        wait_until(lambda: service.held > MEGABYTE)
        wait_until(lambda: not all(inside._is_open for inside in service.clients), what="clients past the limit to end")
        assert_goes_on(service)
        for client in clients:
            client.reset()
        service.wait_clients(0)
        assert service.held == 0


def bytes_of(service):
    """Those of requests that gmux really holds for its clients."""
    exchanges = [inside._exchange for inside in service.clients if inside._exchange is not None]
    return sum(len(inside._decoder.data) for inside in service.clients) + sum(len(e.request.data) for e in exchanges)


def test_clients_that_send_ahead_past_memory_limit_are_not_read_until_their_turn():
    """All of them are served in the end, with what they sent meanwhile."""
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target, memory_limit="1M"))
        clients = [stack.enter_context(Client(service.address)) for _ in range(20)]
        # Small ones: one that is large may find no room in its turn.
        requests = [[tagged(number, n).ljust(1000, b".") for n in range(100)] for number in range(20)]
        for client, (first, *ahead) in zip(clients, requests, strict=True):
            client.send(first)
            client.pipeline(ahead)
        wait_until(lambda: target.requests and sum(not inside._is_reading for inside in service.clients) >= 10)
        assert bytes_of(service) <= service.held + 20 * SMALL <= MEGABYTE
        for _ in range(2000):
            gate.release()
        for client, wanted in zip(clients, requests, strict=True):
            assert [client.receive() for _ in wanted] == wanted
        wait_until(lambda: not service.held)


def test_whole_requests_that_wait_past_memory_limit_get_an_end():
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target, memory_limit="1M"))
        clients = [stack.enter_context(Client(service.address)) for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(tagged(number, 0).ljust(60_000, b"."))
        wait_until(lambda: sum(inside._exchange is not None or not inside._is_open for inside in service.clients) == 20)
        assert bytes_of(service) == service.held <= MEGABYTE // 2
        small = stack.enter_context(Client(service.address))
        small.send(b"small")
        for _ in range(20):
            gate.release()
        assert small.receive() == b"small"
        ends = []
        for number, client in enumerate(clients):
            try:
                ends.append(client.receive() == tagged(number, 0).ljust(60_000, b"."))
            except Closed:
                ends.append(None)
        assert (ends.count(True), ends.count(None)) == (8, 12)
        assert service.held == 0


def test_clients_past_memory_limit_get_an_end():
    with Target() as target, serving(target, memory_limit="64k") as service, ExitStack() as stack:
        clients = [stack.enter_context(Client(service.address)) for _ in range(4)]
        for client in clients:
            assert client.ask(b"inside") == b"inside"
        with Client(service.address) as late:
            late.receive_end()
        clients.pop().sock.close()
        wait_until(lambda: len(service.clients) == 3)
        assert_goes_on(service)


def test_client_told_to_go_that_stays_holds_no_bytes():
    with Target() as target, serving(target, max_message="10k") as service, Client(service.address) as client:
        client.send_raw(b"." * 60_000)
        client.receive_end()
        assert [len(inside._decoder.data) for inside in service.clients] == [0]
        assert service.held == 0


def test_memory_of_clients_that_are_gone_goes_back_to_the_system():
    much = 64 * MEGABYTE
    with ExitStack() as stack:
        target = stack.enter_context(Target(lambda connection, request: (answer,) if request == b"first\n" else never))
        server = stack.enter_context(Server(target, queue_timeout="0", timeout="0"))
        with Client(server.address) as client:
            assert client.ask(b"first") == b"first"
        (worker,) = server.workers()
        before = resident_bytes(worker)
        clients = [stack.enter_context(Client(server.address)) for _ in range(450)]
        # Freed in any order: what lies between pieces in use does not go back by itself.
        for client in clients:
            client.flood(b"." * 60_000 + b"\n" + b"ahead\n" * 20_000, 260_000, patience=0.01)
        wait_until(lambda: resident_bytes(worker) - before > much)
        for client in clients:
            client.reset()
        wait_until(lambda: resident_bytes(worker) - before < much // 4)


def test_big_request_is_not_counted_any_more_when_it_is_answered():
    with Target() as target, serving(target) as service, Client(service.address) as client:
        big = b"big".ljust(3 * MEGABYTE, b".")
        assert client.ask(big) == big
        wait_until(lambda: service.held == 0)


def test_answer_of_50_megabytes_never_read_goes_to_disk():
    settings = {"max_message": "64M", "memory_limit": "1M", "spool_memory": "64k"}
    with Target(in_turn((padded(50 * MEGABYTE),))) as target, serving(target, **settings) as service:
        before = spool_bytes(os.getpid())
        with Client(service.address, receive_buffer=4096) as client:
            client.send(b"much")
            wait_until(lambda: spool_bytes(os.getpid()) - before > 40 * MEGABYTE)
            assert service.held <= MEGABYTE
            assert_goes_on(service)
            client.reset()
        service.wait_clients(0)
        assert spool_bytes(os.getpid()) == before


def test_answer_past_spool_limit_ends_its_client():
    settings = {"max_message": "32M", "spool_limit": "5M"}
    with Target(in_turn((padded(20 * MEGABYTE),))) as target, serving(target, **settings) as service:
        with Client(service.address, receive_buffer=4096) as client:
            client.send(b"much")
            wait_until(lambda: target.requests)
            service.wait_clients(0)
        assert_goes_on(service)
        assert target.accepted == 1


def test_thousand_pipelined_requests_never_read_are_held_back():
    """50 MB of answers: what the client does not take is not even asked of the target."""
    with ExitStack() as stack:
        target = stack.enter_context(Target((padded(50_000),)))
        service = stack.enter_context(serving(target))
        client = stack.enter_context(Client(service.address, receive_buffer=4096))
        other = stack.enter_context(Client(service.address))
        client.pipeline(tagged(1, n) for n in range(1000))
        wait_until(lambda: target.requests and service.is_whole)
        for n in range(20):
            assert other.ask(tagged(2, n)) == tagged(2, n).ljust(50_000, b".")
        assert service.held <= service.config.spool_memory
        assert len(target.requests) < 1000
        client.reset()


def test_client_that_takes_no_answer_and_goes_on_sending_is_held_back():
    """What it sends behind its answer is not read without end: it waits in the kernel, then in the client."""
    with ExitStack() as stack:
        target = stack.enter_context(Target(in_turn((padded(8 * MEGABYTE),))))
        service = stack.enter_context(serving(target))
        client = stack.enter_context(Client(service.address, receive_buffer=4096))
        client.send(b"much")
        wait_until(lambda: target.requests and service.is_whole)
        client.flood(b"ping\n" * 20_000, 64 * MEGABYTE)
        (held,) = (len(inside._decoder) for inside in service.clients)
        assert held <= MEGABYTE
        client.reset()


def test_client_that_takes_no_answer_is_ended_after_write_timeout():
    settings = {"client_write_timeout": "100ms"}
    with Target(in_turn((padded(8 * MEGABYTE),))) as target, serving(target, **settings) as service:
        with Client(service.address, receive_buffer=4096) as client:
            client.send(b"much")
            wait_until(lambda: target.requests)
            service.wait_clients(0)
        assert_goes_on(service)


def test_client_told_to_go_that_goes_on_sending_is_cut_off(monkeypatch):
    monkeypatch.setattr(gmux.client, "LINGER_TIMEOUT", 0.1)
    with Target() as target, serving(target, max_message="10k") as service, Client(service.address) as client:
        client.send_raw(b"." * 11_000)
        client.receive_end()
        client.flood(b"." * 1000, 1 << 40, patience=5)
        service.wait_clients(0)
        assert service.held == 0
        assert target.requests == []


def test_client_idle_is_ended_after_idle_timeout():
    # Long enough for a request to come before, however busy the machine.
    with Target() as target, serving(target, client_idle_timeout="500ms") as service, Client(service.address) as client:
        assert client.ask(b"request") == b"request"
        client.receive_end()


def test_answers_without_end_are_cut_off():
    """The target sends for ever: the connection ends at the size limit, not at the end of memory."""

    def endless(connection, request):
        while True:
            connection.send(b"." * 65536)

    with Target(in_turn((endless,))) as target, serving(target, max_message="1M") as service:
        with Client(service.address) as client:
            assert client.outcome(b"request") == "closed"
        assert_goes_on(service)


def test_target_floods_idle_connection_is_cut_off():
    with Target(greeting=(pause(0.01), send(b"." * MEGABYTE))) as target, serving(target) as service:
        wait_until(lambda: target.accepted > 1)
        target.greeting = ()
        wait_until(lambda: service.is_ready)
        assert target.peak == 1


def test_clients_of_every_kind_of_misconduct_leave_nothing_behind():
    with Target(in_turn(never)) as target, serving(target, timeout="500ms", max_message="10k") as service:
        for n in range(20):
            client = Client(service.address)
            (
                lambda client: client.send_half(b"request"),
                lambda client: client.send(b"request"),
                lambda client: client.pipeline([b"request"] * 100),
                lambda client: client.flood(b"." * 4096, 20_000),
                lambda client: None,
            )[n % 5](client)
            client.vanish("fin" if n % 2 else "reset")
        service.wait_clients(0)
        assert_goes_on(service)
        wait_until(lambda: service.is_whole and not service.held)


def test_abandoned_request_is_forgotten_when_its_answer_has_come():
    """Else a client that asks and leaves, again and again, holds each of its requests for DISCARD_TIMEOUT."""
    with Target((pause(0.02), answer)) as target, serving(target) as service:
        for n in range(5):
            with Client(service.address) as client:
                client.send(b"gone")
                wait_until(lambda n=n: len(target.requests) == n + 1)
                client.vanish("reset")
            service.wait_clients(0)
        wait_until(lambda: service.is_whole)
        assert len(service.pool._discarding) == 0


@pytest.mark.parametrize(
    "data",
    [MPU.wrap(b"") + MPU.wrap(b"x" * 5000) * 4, MPU.wrap(b"") + MPU.wrap(b"x" * 20_000)[:-1], MPU.wrap(b"") + b"00"],
    ids=["requests", "half a request", "half a header"],
)
def test_client_that_is_gone_before_its_keepalive_is_answered_holds_nothing(data):
    with Target(framing=MPU) as target, serving(target) as service:
        service.wait_ready()
        for _ in range(50):
            client = Client(service.address, MPU)
            client.send_raw(data)
            client.reset()
        service.wait_clients(0)
        wait_until(lambda: service.held == 0, what="memory that is given back")
        assert not service.route._clients.requesting
        assert_goes_on(service, MPU)
