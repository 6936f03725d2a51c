"""Invariant 5: a request that may have reached the target is not sent again; one that cannot have is not lost."""

from __future__ import annotations

import random

import gevent
import pytest

from tests.support.clients import Client, tagged
from tests.support.framing import HTTP, ISO8583, LINE, Framing
from tests.support.service import serving
from tests.support.target import (
    Target,
    answer,
    at_random,
    bytewise,
    close,
    every,
    garbage,
    half,
    never,
    pause,
    reset,
    send,
    twice,
)
from tests.support.wait import wait_until

FAULTS = {
    "never": never,
    "late": (pause(0.03), answer),
    "byte by byte": (bytewise,),
    "first byte then close": (send(b"\0"), close),
    "half then silence": (half,),
    "half then close": (half, close),
    "half then reset": (half, reset),
    "garbage": (garbage,),
    "twice": (twice,),
    "close": (close,),
    "reset": (reset,),
    "answer then close": (answer, close),
    "answer then reset": (answer, reset),
}


@pytest.mark.parametrize("steps", FAULTS.values(), ids=FAULTS)
def test_iso8583_request_under_fault_is_sent_at_most_once(steps):
    """Every other message meets the fault, so that the faults come on reused connections too."""
    with Target(every(2, steps), ISO8583) as target, serving(target, timeout="15ms") as service:

        def use(number):
            for n in range(5):
                with Client(service.address, ISO8583) as client:
                    client.outcome(tagged(number, n))

        gevent.joinall([gevent.spawn(use, number) for number in range(4)], raise_error=True)
        assert max(target.times().values()) == 1


def test_iso8583_request_under_random_faults_is_sent_at_most_once():
    dice = random.Random(21)
    behaviour = at_random(dice, 0.3, *FAULTS.values())
    with Target(behaviour, ISO8583) as target, serving(target, timeout="15ms", pool_size="3") as service:

        def use(number):
            for n in range(20):
                with Client(service.address, ISO8583) as client:
                    client.send(tagged(number, n))
                    if dice.random() < 0.1:
                        gevent.sleep(0)
                        client.vanish(dice.choice(("fin", "reset")))

        gevent.joinall([gevent.spawn(use, number) for number in range(10)], raise_error=True)
        assert max(target.times().values()) == 1


def close_quietly(target):
    target.close_all()


def close_after_rest(target):
    """gmux has seen the end, and perhaps has a new connection, when the next request comes."""
    target.close_all()
    gevent.sleep(0)


ENDS = {
    "close": close_quietly,
    "close a turn before": close_after_rest,
    "reset": lambda target: target.reset_all(),
    "unsolicited bytes": lambda target: target.say(b"\0\1?"),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_idle_connection_ended_by_the_target_no_request_is_lost(end):
    """The end and the next request come without a turn of the loop between them."""
    with Target(framing=ISO8583) as target, serving(target) as service, Client(service.address, ISO8583) as client:
        for n in range(50):
            assert client.ask(tagged(1, n)) == tagged(1, n)
            end(target)
        assert set(target.times().values()) == {1}
        assert target.accepted >= 50
        assert target.peak == 1


def test_idle_connection_ended_before_its_first_request_no_request_is_lost():
    """A target that closes what is idle does so to a connection that was made in advance, too: it is not down.

    Time is the subject: a target that ends a connection at once is down, one that ends it later had it idle.
    """
    with Target() as target, serving(target, retry_delay="20ms") as service, Client(service.address) as client:
        for n in range(4):
            # One that was made in advance, and one for a request, in each round before.
            wait_until(lambda n=n: target.accepted == 2 * n + 1)
            service.wait_ready()
            gevent.sleep(0.05)
            target.close_all()
            assert client.outcome(tagged(1, n)) == "answered"
            target.close_all()


@pytest.mark.parametrize("size", ["1", "3"])
def test_connection_closed_right_behind_the_answer_no_waiting_request_is_lost(size):
    """One answer a connection: the next in line must not be put on one whose end has come."""
    with Target((answer, close)) as target, serving(target, pool_size=size) as service:
        closed = []

        def use(number):
            with Client(service.address) as client:
                if client.outcome(tagged(number, 0)) == "closed":
                    closed.append(number)

        gevent.joinall([gevent.spawn(use, number) for number in range(20)], raise_error=True)
        assert closed == []
        assert target.times() == {tagged(number, 0): 1 for number in range(20)}


def test_connection_reset_before_handover_request_goes_again():
    """Not one byte of it was sent, so it goes on the next connection, though ISO 8583 repeats nothing."""
    with Target(framing=ISO8583) as target, serving(target, request_delay="1s") as service:
        with Client(service.address, ISO8583) as first, Client(service.address, ISO8583) as second:
            assert first.ask(b"first") == b"first"
            second.send(b"second")
            wait_until(lambda: service.waiting)
            target.reset_all()
            assert second.receive() == b"second"
        assert target.times() == {b"first": 1, b"second": 1}


@pytest.mark.parametrize("framing", [LINE, ISO8583], ids=str)
def test_reused_connection_closed_instead_of_an_answer_request_is_not_repeated(framing):
    with Target(every(2, (close,)), framing) as target, serving(target) as service:
        with Client(service.address, framing) as client:
            assert client.outcome(b"first") == "answered"
            assert client.outcome(b"second") == "closed"
        with Client(service.address, framing) as client:
            assert client.outcome(b"third") == "answered"
        assert target.times() == {b"first": 1, b"second": 1, b"third": 1}


def test_http_request_whose_answer_began_with_a_dropped_100_is_not_sent_again():
    seen = []

    def behaviour(connection, request):
        seen.append(request)
        return (answer,) if len(seen) == 1 else (send(b"HTTP/1.1 100 Continue\r\n\r\n"), close)

    with Target(behaviour, HTTP) as target, serving(target) as service, Client(service.address, HTTP) as client:
        for path in (b"first", b"second"):
            client.send_raw(b"PUT /" + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
            told = HTTP.read(client)
        assert told.startswith(b"HTTP/1.1 502 ")
        assert [request.split(b" ")[1] for request in seen] == [b"/first", b"/second"]


@pytest.mark.parametrize("pipeline", ["1", "4"])
@pytest.mark.parametrize("method", [b"POST", b"PUT"])
def test_http_body_half_taken_by_the_target_is_not_sent_again(method, pipeline):
    """It went again, without what had been taken of it: the rest of an upload, under the head of the whole."""
    size = 8_000_000
    begun = []

    def read(stream):
        head = stream.until(b"\r\n\r\n")
        if head.startswith(method):
            begun.append(stream.exactly(200_000))
            stream.close()
        return head

    framing = Framing("http", read, HTTP.wrap, HTTP.payload)
    with Target(framing=framing) as target, serving(target, pipeline=pipeline) as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(method + b" /a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            assert HTTP.read(client).startswith(b"HTTP/1.1 502 ")
        assert len(begun) == 1
