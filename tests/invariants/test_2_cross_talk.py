"""Invariant 2: a client gets the answers to its own requests, in its order, and nothing else.

One case is beyond any multiplexer of a protocol without keys, and is not tested: a second answer to one request that
comes when the next request is out already.
"""

from __future__ import annotations

import random

import gevent
import pytest
from gevent.lock import Semaphore

from tests.support.clients import Client, tagged, untag
from tests.support.framing import ISO8583, LINE, MPU
from tests.support.service import serving
from tests.support.stream import Closed
from tests.support.target import (
    Target,
    answer,
    at_random,
    bytewise,
    close,
    garbage,
    half,
    hold,
    in_turn,
    never,
    pause,
    reset,
    twice,
)
from tests.support.wait import wait_until

#: Everything that can go wrong; the late answer comes after the timeout of these tests.
TIMEOUT = "30ms"
FAULTS = [
    (bytewise,),
    (pause(0.005), answer),
    (pause(0.05), answer),
    (twice,),
    (garbage,),
    (half,),
    (half, close),
    (half, reset),
    (close,),
    (reset,),
    (answer, close),
    (answer, reset),
    never,
]


@pytest.mark.parametrize(
    ("framing", "size", "seed"), [(LINE, "1", 11), (ISO8583, "1", 12), (MPU, "3", 13), (LINE, "3", 14)], ids=str
)
def test_answers_random_faults_and_aborts_reach_only_their_client(framing, size, seed):
    """50 clients; each message carries its client and its place, and any other answer fails."""
    print("seed", seed)
    dice = random.Random(seed)
    right = 0

    def use(number):
        nonlocal right
        sent = 0
        while sent < 20:
            with Client(service.address, framing) as client:
                while sent < 20:
                    first, sent = sent, sent + dice.choice((1, 1, 1, 4))
                    client.pipeline(tagged(number, n) for n in range(first, sent))
                    if dice.random() < 0.05:
                        gevent.sleep(0)
                        client.vanish(dice.choice(("fin", "reset")))
                        break
                    try:
                        for n in range(first, sent):
                            assert untag(client.receive()) == (number, n)
                            right += 1
                    except Closed:
                        break

    with (
        Target(at_random(dice, 0.08, *FAULTS), framing) as target,
        serving(target, pool_size=size, timeout=TIMEOUT) as service,
    ):
        gevent.joinall([gevent.spawn(use, number) for number in range(50)], raise_error=True)
        assert right > 300, "most requests must be answered, else the test tests nothing"
        assert max(target.times().values()) == 1


@pytest.mark.parametrize("framing", [LINE, ISO8583, MPU], ids=str)
def test_answer_after_timeout_reaches_nobody(framing):
    gate = Semaphore(0)
    target = Target(in_turn((hold(gate), answer)), framing)
    with target, serving(target, timeout="500ms") as service, Client(service.address, framing) as first:
        first.send(b"first")
        wait_until(lambda: target.requests)
        with Client(service.address, framing) as second, Client(service.address, framing) as third:
            # One waits while the first is in flight, one comes when its answer is late already.
            second.send(b"second")
            first.receive_end()
            gate.release()
            third.send(b"third")
            assert second.receive() == b"second"
            assert third.receive() == b"third"


def test_answer_of_vanished_client_reaches_nobody():
    with Target(in_turn((pause(0.02), answer))) as target, serving(target) as service:
        with Client(service.address) as first:
            first.send(b"first")
            wait_until(lambda: target.requests)
            first.vanish("reset")
        with Client(service.address) as second:
            assert second.ask(b"second") == b"second"
        assert target.accepted == 1


def test_second_answer_on_idle_connection_reaches_nobody():
    with Target() as target, serving(target) as service, Client(service.address) as client:
        for n in range(10):
            assert client.ask(tagged(1, n)) == tagged(1, n)
            # No switch between: the bytes are there when gmux sees the next request.
            target.say(tagged(2, n) + b"\n")
        assert client.ask(b"end") == b"end"
        assert target.peak == 1


def test_answers_thousand_pipelined_requests_come_in_order():
    with Target() as target, serving(target, pool_size="3") as service, Client(service.address) as client:
        client.pipeline(tagged(1, n) for n in range(1000))
        assert [untag(client.receive()) for _ in range(1000)] == [(1, n) for n in range(1000)]


def test_answers_slow_and_fast_connections_keep_each_clients_order():
    dice = random.Random(5)
    behaviour = at_random(dice, 0.1, (pause(0.004), answer), (bytewise,))
    with Target(behaviour) as target, serving(target, pool_size="3") as service:

        def use(number):
            with Client(service.address) as client:
                client.pipeline(tagged(number, n) for n in range(50))
                assert [untag(client.receive()) for _ in range(50)] == [(number, n) for n in range(50)]

        gevent.joinall([gevent.spawn(use, number) for number in range(8)], raise_error=True)
        assert target.peak == 3
