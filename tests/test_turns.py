"""One client that asks for much at once, and what the others and the log notice of it: little."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic, thread_time

import gevent
import iso8583
import pytest
from gevent import socket
from iso8583.specs import default_ascii as SPEC

from gmux.codecs.http import HttpCodec
from gmux.net import READ_SIZE
from gmux.ratelimit import MAX_LINES, PERIOD
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client
from tests.support.framing import HTTP, MPU
from tests.support.service import LOG, Service, serving
from tests.support.stream import Closed
from tests.support.target import Target, closed_port, send
from tests.support.wait import wait_until

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
REFUSAL = b"HTTP/1.1 502 "
MANY = 5000

#: Refusals that others may get before a client that asks once gets its own.
FEW = 500

CHUNKS = 200_000
CHUNK = b"1\r\nx\r\n"


@pytest.fixture
def refused(monkeypatch) -> list[None]:
    """Has an entry for each refusal that was made."""
    made: list[None] = []
    usual = HttpCodec.refuse

    def refuse(self, error, request):
        made.append(None)
        return usual(self, error, request)

    monkeypatch.setattr(HttpCodec, "refuse", refuse)
    return made


def dead_service(stack: ExitStack) -> Service:
    """A route to a target that is known to be down, for longer than the test."""
    service = stack.enter_context(serving(closed_port(), protocol="http", retry_delay="10m"))
    with Client(service.address, HTTP) as client:
        client.send_raw(GET)
        assert HTTP.read(client).startswith(REFUSAL)
    service.wait_clients(0)
    return service


def count_refusals(client: Client, number: int) -> int:
    """The refusals that come, until there are `number` or the connection ends."""
    found = 0
    while found < number:
        try:
            found += HTTP.read(client).startswith(REFUSAL)
        except Closed:
            break
    return found


@pytest.mark.parametrize("ends", [False, True], ids=["stays", "half-closes"])
def test_pipelined_requests_target_down_others_are_refused_in_their_turn(refused, ends):
    """Each refusal is made at once, so no turn ends by itself (invariant 7)."""
    with ExitStack() as stack:
        service = dead_service(stack)
        greedy, *others = [stack.enter_context(Client(service.address, HTTP)) for _ in range(5)]
        service.wait_clients(5)
        refused.clear()
        seen: list[int] = []

        def ask(client: Client) -> None:
            client.send_raw(GET)
            assert HTTP.read(client).startswith(REFUSAL)
            seen.append(len(refused))

        def pipeline() -> None:
            greedy.send_raw(GET * MANY)
            if ends:
                greedy.sock.shutdown(socket.SHUT_WR)

        # Two ask before, two behind: whichever end of the line the loop begins with, some come after the greedy one.
        users = [gevent.spawn(ask, client) for client in others[:2]]
        users.append(gevent.spawn(pipeline))
        users += [gevent.spawn(ask, client) for client in others[2:]]
        counting = gevent.spawn(count_refusals, greedy, MANY)
        gevent.joinall(users, raise_error=True)
        assert counting.get() == MANY
        assert len(seen) == 4
        assert max(seen) < FEW
        if ends:
            greedy.receive_end()
        else:
            greedy.send_raw(GET)
            assert count_refusals(greedy, 1) == 1


def test_pipelined_requests_target_down_last_one_closes_none_is_lost():
    with ExitStack() as stack:
        service = dead_service(stack)
        client = stack.enter_context(Client(service.address, HTTP))
        client.send_raw(GET * (MANY - 1) + b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + GET)
        assert count_refusals(client, MANY + 1) == MANY


def test_pipelined_requests_client_vanishes_in_the_middle_nothing_is_left(refused):
    with ExitStack() as stack:
        service = dead_service(stack)
        refused.clear()
        with Client(service.address, HTTP) as client:
            client.send_raw(GET * MANY)
            wait_until(lambda: refused)
            client.reset()
        service.wait_clients(0)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection goes through what all other tests have left: it holds the loop for longer than what is measured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def longest_hold(during) -> float:
    """The share of the CPU time of `during` that one turn of the loop takes; the second longest, as one may be odd.

    A share, and of CPU time, because machines differ and others use them, too.
    """
    turns = []
    running = gevent.spawn(during)
    last = thread_time()
    while not running.ready():
        gevent.sleep(0.001)
        now = thread_time()
        turns.append(now - last)
        last = now
    running.get()
    return sorted(turns)[-2] / sum(turns)


@pytest.mark.parametrize("clients", [1, 4])
def test_upload_in_chunks_of_one_byte_does_not_hold_the_loop(clients):
    """A turn takes less of each client than all chunks of a full read, which are 6 % of these."""
    data = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK * (CHUNKS // clients)

    def upload(client: Client) -> None:
        client.send_raw(data + b"0\r\n\r\n")
        assert count_refusals(client, 1) == 1

    with ExitStack() as stack:
        service = dead_service(stack)
        users = [stack.enter_context(Client(service.address, HTTP)) for _ in range(clients)]
        service.wait_clients(clients)

        def run() -> None:
            gevent.joinall([gevent.spawn(upload, user) for user in users], raise_error=True)

        with no_garbage_collection():
            hold = longest_hold(run)
        assert hold < 0.75 * clients * READ_SIZE / len(CHUNK) / CHUNKS


def test_answer_in_chunks_of_one_byte_does_not_hold_the_loop():
    """A turn takes less of the target than all chunks of a full read, which are 6 % of these."""
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK * CHUNKS + b"0\r\n\r\n"
    with ExitStack() as stack:
        target = stack.enter_context(Target((send(data),), HTTP))
        service = stack.enter_context(serving(target, protocol="http"))
        client = stack.enter_context(Client(service.address, HTTP))

        def run() -> None:
            client.send_raw(GET)
            HTTP.read(client)
            client.until(b"\r\n0\r\n\r\n")

        with no_garbage_collection():
            hold = longest_hold(run)
        assert hold < 0.75 * READ_SIZE / len(CHUNK) / CHUNKS


@pytest.mark.parametrize("settings", [{}, {"pipeline": "4"}, {"correlation": "key"}], ids=["strict", "order", "key"])
def test_echo_tests_of_a_target_do_not_hold_the_loop_and_a_request_among_them_is_answered(settings):
    number = 3_000
    echo_test = MPU.wrap(
        bytes(iso8583.encode({"h": "", "t": "0800", "7": "1125084600", "11": "000001", "70": "301"}, SPEC)[0])
    )
    fields = {"h": "", "11": "000007", "41": "TERM0001"}
    request = bytes(iso8583.encode({"t": "0200"} | fields, SPEC)[0])
    reply = bytes(iso8583.encode({"t": "0210"} | fields, SPEC)[0])
    with ExitStack() as stack:
        steps = (send(echo_test * number), send(MPU.wrap(reply)))
        # It does not answer the answers to its echo tests.
        behaviour = lambda connection, message: steps if MPU.payload(message) == request else ()  # noqa: E731
        target = stack.enter_context(Target(behaviour, MPU))
        service = stack.enter_context(serving(target, answer_network_management="true", **settings))
        client = stack.enter_context(Client(service.address, MPU))

        def run() -> None:
            client.send(request)
            assert client.receive() == reply

        with no_garbage_collection():
            hold = longest_hold(run)
        # What one read holds of them.
        assert hold < 0.75 * READ_SIZE / len(echo_test) / number


def test_log_of_many_refusals_for_the_same_cause_is_bounded_and_counts_all(caplog, monkeypatch):
    number = 1000
    # Its own log: what was left out of another test's may be told while this one runs.
    log = LOG.getChild("turns")
    monkeypatch.setattr("tests.support.service.LOG", log)
    caplog.set_level(logging.WARNING, log.name)

    def lines() -> list[str]:
        """Those about refusals; the pool's own word on the target comes without a cause."""
        told = [record.getMessage() for record in caplog.records if record.name == log.name]
        return [line for line in told if "upstream/connect" in line]

    def told() -> int:
        counts = [re.search(r"(\d+) more", line) for line in lines()]
        return sum(int(count[1]) if count else 1 for count in counts)

    with ExitStack() as stack:
        begin = monotonic()
        service = dead_service(stack)
        with Client(service.address, HTTP) as client:
            client.send_raw(GET * (number - 1))
            assert count_refusals(client, number - 1) == number - 1
        # On a busy machine they take more than one period, which has its lines anew. A timer may be a little early.
        periods = 1 + int((monotonic() - begin) / (0.9 * PERIOD))
        wait_until(lambda: told() >= number, what="the word on those that were left out")
    assert told() == number
    assert len(lines()) <= periods * (MAX_LINES + 1)
    assert any(re.search(r"\d+ more", line) for line in lines())
