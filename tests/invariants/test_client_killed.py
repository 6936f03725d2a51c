"""A client's greenlet is killed in each phase of its life: the pool is whole afterwards, and the next is served."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gevent.lock import Semaphore

from tests.support.clients import Client
from tests.support.service import serving
from tests.support.target import Steps, Target, answer, half, hold, in_turn, padded, rest
from tests.support.wait import wait_until


def idle(service, target, client):
    assert client.ask(b"request") == b"request"


def in_its_request(service, target, client):
    client.send_half(b"request")
    wait_until(lambda: service.clients and all(len(inside._decoder) for inside in service.clients))


def in_line(service, target, client):
    client.pipeline([b"first", b"second"])
    with Client(service.address) as other:
        wait_until(lambda: target.requests)
        other.send(b"other")
        wait_until(lambda: service.waiting)
        kill(service)


def in_flight(service, target, client):
    client.send(b"request")
    wait_until(lambda: target.requests)


def pipelining(service, target, client):
    client.pipeline([b"request"] * 100)
    wait_until(lambda: target.requests)


def in_its_answer(service, target, client):
    client.send(b"request")
    wait_until(lambda: any(len(upstream._decoder) for upstream in service.pool._upstreams))


def behind_its_answer(service, target, client):
    client.send(b"request")
    wait_until(lambda: any(inside._outbox is not None for inside in service.clients))


def refused(service, target, client):
    client.send_raw(b"." * 11_000)
    client.receive_end()


def slow(gate: Semaphore) -> Steps:
    return hold(gate), answer


#: How a client enters a phase, and what the target does with its request; what is slow waits until the client is dead.
PHASES: dict[str, tuple[Callable[..., None], Callable[[Semaphore], Steps]]] = {
    "idle": (idle, lambda gate: (answer,)),
    "in its request": (in_its_request, lambda gate: (answer,)),
    "in line": (in_line, slow),
    "in flight": (in_flight, slow),
    "pipelining": (pipelining, slow),
    "in its answer": (in_its_answer, lambda gate: (half, hold(gate), rest)),
    "behind its answer": (behind_its_answer, lambda gate: (padded(9 << 20),)),
    "refused": (refused, lambda gate: (answer,)),
}


def kill(service):
    """Kill all there are; `kill` returns when they have ended."""
    for inside in list(service.clients):
        inside._greenlet.kill()
    assert not service.clients


@pytest.mark.parametrize(("enter", "steps"), PHASES.values(), ids=PHASES)
def test_client_killed_leaves_a_whole_pool(enter, steps):
    max_message = "10k" if enter is refused else "16M"
    gate = Semaphore(0)
    with Target(in_turn(steps(gate))) as target, serving(target, max_message=max_message) as service:
        with Client(service.address, receive_buffer=4096) as client:
            enter(service, target, client)
            kill(service)
            gate.release()
            with Client(service.address) as other:
                assert other.ask(b"next") == b"next"
        wait_until(lambda: service.is_whole)
        assert service.held == 0
        assert target.accepted == 1
