"""Invariant 6: every request ends within `queue-timeout + connect-timeout + timeout`, by an answer or a close."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from time import monotonic, sleep

import gevent
import pytest
from gevent.lock import Semaphore

import gmux.pool
from gmux.client import MAX_AHEAD
from gmux.codecs.base import Request
from gmux.exchange import Exchange
from tests.support.clients import Client
from tests.support.framing import HTTP, MPU
from tests.support.service import MemorySlots, deaf_listener, serving
from tests.support.stream import Closed
from tests.support.target import (
    Target,
    answer,
    bytewise,
    close,
    closed_port,
    garbage,
    half,
    hang,
    hold,
    in_turn,
    never,
    pause,
    reset,
    twice,
)
from tests.support.wait import wait_until

#: Seconds for what is not gmux's: the machine, however busy. What does not end in time here ends much later, or never.
MARGIN = 5.0

FAULTS = {
    "never": never,
    "hang": (hang,),
    "late": (pause(0.1), answer),
    "byte by byte": (bytewise,),
    "one byte and another, never all": tuple([half, pause(0.03)] * 8),
    "half then silence": (half,),
    "half then hang": (half, hang),
    "half then close": (half, close),
    "half then reset": (half, reset),
    "garbage": (garbage,),
    "twice": (twice,),
    "close": (close,),
    "reset": (reset,),
}


def assert_end(service, payload=b"request", framing=None) -> str:
    """The client's request ends in time; how it ends."""
    settings = service.config
    longest = settings.queue_timeout + settings.connect_timeout + settings.timeout + MARGIN
    with Client(service.address, framing) if framing else Client(service.address) as client:
        begin = monotonic()
        outcome = client.outcome(payload)
        took = monotonic() - begin
    assert took < longest
    return outcome


@pytest.mark.parametrize("steps", FAULTS.values(), ids=FAULTS)
def test_request_under_fault_ends_in_time(steps):
    settings = {"timeout": "50ms", "connect_timeout": "50ms", "queue_timeout": "100ms"}
    with Target(steps, MPU) as target, serving(target, **settings) as service:
        users = [gevent.spawn(assert_end, service, b"%d" % n, MPU) for n in range(5)]
        gevent.joinall(users, raise_error=True)
        # A target that hangs is let go, so that the pool is whole at the end.
        target.behaviour = (answer,)
        target.released.set()


def test_request_target_refuses_connections_ends_at_once():
    with serving(closed_port()) as service:
        begin = monotonic()
        for _ in range(10):
            assert assert_end(service) == "closed"
        assert monotonic() - begin < MARGIN


def test_request_target_takes_no_connection_ends_in_time():
    listening, filler = deaf_listener()
    with listening, filler, serving(listening.getsockname(), connect_timeout="50ms", queue_timeout="1s") as service:
        users = [gevent.spawn(assert_end, service) for _ in range(10)]
        gevent.joinall(users, raise_error=True)
        assert {user.value for user in users} == {"closed"}


@pytest.mark.parametrize("steps", [(close,), (reset,), (hang,)], ids=["close", "reset", "hang"])
def test_request_target_ends_each_new_connection_ends_in_time(steps, monkeypatch):
    # A target that hangs counts a connection for longer than gmux waits for its end.
    monkeypatch.setattr(gmux.pool, "CLOSE_TIMEOUT", 60.0)
    settings = {"timeout": "50ms", "queue_timeout": "200ms"}
    with Target(greeting=steps) as target, serving(target, **settings) as service:
        for _ in range(3):
            assert assert_end(service) == "closed"
        assert target.peak == 1
        target.released.set()


def test_request_target_that_was_down_is_served_when_it_is_up():
    address = closed_port()
    with serving(address) as service:
        assert assert_end(service) == "closed"
        with Target(address=address) as target:
            service.wait_ready()
            assert assert_end(service) == "answered"
            assert target.peak == 1


def test_request_waits_in_vain_ends_after_queue_timeout():
    settings = {"queue_timeout": "50ms", "timeout": "60s"}
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        service = stack.enter_context(serving(target, **settings))
        first = stack.enter_context(Client(service.address))
        first.send(b"first")
        wait_until(lambda: target.requests)
        begin = monotonic()
        assert assert_end(service) == "closed"
        assert 0.04 < monotonic() - begin < MARGIN
        # It is the clock of those who wait: the one at the target goes on.
        gate.release()
        assert first.receive() == b"first"
        assert target.requests == [b"first"]


def test_request_never_complete_ends_after_request_timeout():
    with Target() as target, serving(target, request_timeout="50ms") as service, Client(service.address) as client:
        assert client.ask(b"whole") == b"whole"
        client.send_half(b"unfinished")
        client.receive_end()
        assert target.requests == [b"whole"]


def test_request_dripped_for_ever_ends_after_request_timeout():
    """Each byte is a sign of life, but not of a request."""

    def drip(client):
        with suppress(Closed):
            while True:
                client.send_raw(b".")
                gevent.sleep(0.002)

    with Target() as target, serving(target, request_timeout="50ms") as service, Client(service.address) as client:
        dripping = gevent.spawn(drip, client)
        begin = monotonic()
        client.receive_end()
        assert monotonic() - begin < MARGIN
        client.reset()
        dripping.kill()
        assert target.requests == []


def test_request_all_slots_held_elsewhere_ends_in_time():
    slots = MemorySlots(1)
    slot = slots.acquire().slot
    with Target() as target, serving(target, slots, queue_timeout="30ms") as service:
        assert assert_end(service) == "closed"
        assert target.accepted == 0
        slot.release()
        service.wait_ready()
        assert assert_end(service) == "answered"


def test_request_too_large_for_a_target_that_reads_nothing_ends_in_time():
    with Target(greeting=(hang,)) as target, serving(target, timeout="100ms") as service:
        assert assert_end(service, b"big".ljust(12 << 20, b".")) == "closed"
        target.greeting = ()
        target.released.set()


def test_client_that_ends_its_input_gets_its_answers_and_the_end():
    with Target((pause(0.01), answer)) as target, serving(target) as service, Client(service.address) as client:
        client.pipeline([b"first", b"second", b"third"])
        client.sock.shutdown(1)
        assert [client.receive() for _ in range(3)] == [b"first", b"second", b"third"]
        client.receive_end()


def test_client_that_ends_its_input_in_a_request_gets_the_end():
    with Target() as target, serving(target) as service, Client(service.address) as client:
        client.send_half(b"request")
        client.sock.shutdown(1)
        client.receive_end()
        service.wait_clients(0)
        assert target.requests == []


def test_clients_when_gmux_stops_get_their_answers_or_the_end():
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, serving(target) as service, ExitStack() as stack:
        busy, waiting, idle = (stack.enter_context(Client(service.address)) for _ in range(3))
        busy.send(b"busy")
        wait_until(lambda: target.requests)
        waiting.pipeline([b"waiting", b"more"])
        wait_until(lambda: service.waiting)
        draining = gevent.spawn(service.route.drain, 30)
        idle.receive_end()
        idle.fin()
        for _ in range(3):
            gate.release()
        assert busy.receive() == b"busy"
        busy.receive_end()
        busy.fin()
        assert waiting.receive() == b"waiting"
        # What was sent already may be answered, but then comes the end.
        with suppress(Closed):
            assert waiting.receive() == b"more"
            waiting.receive_end()
        waiting.fin()
        assert draining.get() is True


def test_client_far_ahead_is_read_again_when_its_answers_are_out():
    """gmux stops reading a client that is far ahead; here all it was ahead is one whole request."""
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, serving(target) as service, Client(service.address) as client:
        client.send(b"first")
        wait_until(lambda: target.requests)
        second = b"second".ljust(MAX_AHEAD + 10_000, b".")
        client.send(second)
        wait_until(lambda: not any(inside._is_reading for inside in service.clients))
        for _ in range(3):
            gate.release()
        assert client.receive() == b"first"
        assert client.receive() == second
        assert client.ask(b"third") == b"third"


def test_request_queue_of_a_target_that_goes_down_ends_in_time():
    gate = Semaphore(0)
    with Target(in_turn((hold(gate), close))) as target, serving(target, retry_delay="30s") as service:
        first = gevent.spawn(assert_end, service, b"first")
        wait_until(lambda: target.requests)
        others = [gevent.spawn(assert_end, service, b"%d" % n) for n in range(10)]
        wait_until(lambda: service.waiting == 10)
        target.close()
        gate.release()
        begin = monotonic()
        gevent.joinall([first, *others], raise_error=True)
        assert monotonic() - begin < MARGIN
        assert {user.value for user in others} == {"closed"}


def test_connection_of_use_that_ends_is_replaced_at_once_though_one_more_was_refused():
    """That the target takes no second connection while it serves the first says nothing of what it does afterwards."""
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target:
        where = target.where
        settings = {"pool_size": "2", "pool_min": "0", "retry_delay": "1h"}
        with serving(target, **settings) as service, ExitStack() as stack:
            first, second, third = (stack.enter_context(Client(service.address)) for _ in range(3))
            first.send(b"one")
            wait_until(lambda: target.requests == [b"one"])
            target.close()  # it listens no more; the connection stays
            second.send(b"two")
            wait_until(lambda: service.pool._retry_timer is not None, what="the refusal of a second connection")
            gate.release()
            gate.release()
            assert (first.receive(), second.receive()) == (b"one", b"two")
            with Target(address=where) as again:
                target.close_all()
                wait_until(lambda: not service.connected)
                assert third.ask(b"three") == b"three"
                assert again.accepted == 1


def longest_turn(work) -> float:
    """Seconds for which nothing else had a turn of the loop, while `work` waited for its end."""
    longest, is_over = 0.0, False

    def watch():
        nonlocal longest
        last = monotonic()
        while not is_over:
            gevent.sleep(0)
            longest, last = max(longest, monotonic() - last), monotonic()

    watching = gevent.spawn(watch)
    gevent.sleep(0)
    work()
    is_over = True
    watching.join()
    return longest


class SlowToFail:
    """It takes a moment to hear of a failure, as writing a refusal does."""

    name = "slow"

    def __init__(self) -> None:
        self.failed = 0

    def deliver(self, exchange, part):
        raise AssertionError("nothing answers")

    def fail(self, exchange, error):
        self.failed += 1
        end = monotonic() + 0.0002
        while monotonic() < end:
            pass


@pytest.mark.parametrize("way", ["expired", "refused"])
def test_thousands_that_end_together_leave_others_their_turns(way):
    settings = {"expired": {"queue_timeout": "50ms"}, "refused": {"retry_delay": "1h"}}[way]
    with Target(never) as target, serving(target, **settings) as service:
        service.wait_ready()
        asker = SlowToFail()
        exchanges = [Exchange(asker, Request(b"%d\n" % number)) for number in range(2001)]
        for exchange in exchanges:
            service.pool.checkout(exchange)

        def work():
            if way == "refused":
                target.close()
                target.close_all()
            wait_until(lambda: asker.failed >= 2000)

        assert longest_turn(work) < 0.2  # all together take 0.4 s
        target.close_all()
        wait_until(lambda: asker.failed == 2001)


def test_request_is_not_sent_again_when_its_time_is_over():
    """What it took before, and what it may take now, are together no longer than the docs say."""
    seen = []

    def behaviour(connection, request):
        seen.append(request)
        return (answer,) if len(seen) == 1 else (pause(0.3), close)

    settings = {"queue_timeout": "100ms", "connect_timeout": "100ms", "timeout": "60s"}
    with Target(behaviour, HTTP) as target, serving(target, **settings) as service:
        with Client(service.address, HTTP) as client:
            for path in (b"first", b"second"):
                client.send_raw(b"GET /" + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
                told = HTTP.read(client)
        assert told.startswith(b"HTTP/1.1 502 ")
        assert len(seen) == 2


def test_request_that_is_sent_again_waits_no_longer_than_its_time():
    gate = Semaphore(0)
    seen = []

    def behaviour(connection, request):
        seen.append(request)
        return {1: (answer,), 2: (pause(0.35), close)}.get(len(seen), (hold(gate), answer))

    settings = {"queue_timeout": "300ms", "connect_timeout": "100ms", "timeout": "60s", "pool_min": "0"}
    slots = MemorySlots(1)
    with Target(behaviour, HTTP) as target, serving(target, slots, **settings) as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n")
            HTTP.read(client)
            begin = monotonic()
            client.send_raw(b"GET /second HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: len(seen) == 2)
            # Another process takes the slot when the connection has ended.
            taker = gevent.spawn(slots.acquire)
            told = HTTP.read(client)
            took = monotonic() - begin
        assert told.startswith(b"HTTP/1.1 503 ")
        assert 0.35 < took < 0.35 + 0.2  # not the time before and a whole --queue-timeout
        taker.get().slot.release()


def test_answer_that_came_in_time_is_delivered_though_the_process_was_held_up():
    """Timeouts are looked at after what is ready: a process that was stopped for a minute loses nothing by it."""
    with Target(never) as target, serving(target, timeout="300ms") as service, Client(service.address) as client:
        client.send(b"x")
        wait_until(lambda: target.requests)
        target.say(b"x\n")
        sleep(0.4)  # nothing in this process goes on
        assert client.receive() == b"x"
