"""The flags of the pool: how many connections, who waits how long, and what a connection's life is like."""

from __future__ import annotations

from contextlib import ExitStack
from time import monotonic

import gevent
import pytest
from gevent.lock import Semaphore

from tests.flags.support import ask_http
from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.service import Server, deaf_listener, serving
from tests.support.target import Target, answer, closed_port, hold, never
from tests.support.wait import PATIENCE, wait_until


class Clock:
    """When each step of a target was: `mark` is the step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def mark(self, connection, request) -> None:
        self.times.append(monotonic())

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


# How many.


def test_pool_size_two_carries_two_requests_at_once_and_no_third():
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        server = stack.enter_context(Server(target, pool_size="2"))
        clients = [stack.enter_context(Client(server.address)) for _ in range(3)]
        for client in clients:
            client.send(b"request")
        wait_until(lambda: len(target.requests) == 2)
        for _ in clients:
            gate.release()
        assert [client.receive() for client in clients] == [b"request"] * 3
        assert target.peak == 2


@pytest.mark.parametrize(("budgets", "connections"), [(("one", "one"), 1), (("one", "two"), 2)])
def test_budget_is_shared_by_those_that_name_it_alike_however_the_target_is_written(budgets, connections):
    with ExitStack() as stack:
        target = stack.enter_context(Target())
        port = target.server_port
        places = (("127.0.0.1", port), ("localhost", port))
        servers = [
            stack.enter_context(Server(place, protocol="echo", budget=f"{budget}-{port}"))
            for place, budget in zip(places, budgets, strict=True)
        ]
        for _ in range(3):
            for server in servers:
                with Client(server.address) as client:
                    assert client.ask(b"request") == b"request"
        assert target.peak == connections


def test_pool_min_zero_opens_the_first_connection_for_the_first_client():
    with Target() as target, Server(target, pool_min="0") as server, Client(server.address) as client:
        assert client.ask(b"request") == b"request"
        wait_until(lambda: server.said("new target connection"))
        events = [line.partition("] ")[2][:8] for line in server.log]
        assert events.index("#1: 127.") < events.index("creating")


def test_pool_min_one_of_two_is_kept_when_both_are_idle():
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        server = stack.enter_context(Server(target, pool_size="2", pool_min="1", upstream_idle_timeout="100ms"))
        clients = [stack.enter_context(Client(server.address)) for _ in range(2)]
        for client in clients:
            client.send(b"request")
        wait_until(lambda: target.open == 2)
        gate.release()
        gate.release()
        wait_until(lambda: target.open == 1)
        gevent.sleep(0.25)  # longer than the idle timeout: the last one could have gone, too
        assert (target.open, target.accepted) == (1, 2)


def test_pool_min_two_are_opened_at_start_and_again_when_closed():
    with Target() as target, Server(target, pool_size="2", pool_min="2"):
        wait_until(lambda: target.open == 2)
        target.close_all()
        wait_until(lambda: (target.open, target.accepted) == (2, 4))
        assert target.peak == 2


# Who waits: the three clocks of a request have three refusals.


def test_queue_limit_one_lets_one_request_wait_and_refuses_the_next():
    gate = Semaphore(0)
    with Target((hold(gate), answer), HTTP) as target, Server(target, queue_limit="1") as server:
        first = gevent.spawn(ask_http, server)
        wait_until(lambda: target.requests)
        # Which of the two comes first is open: one of them is refused while the other waits.
        others = [gevent.spawn(ask_http, server) for _ in range(2)]
        (refused,) = gevent.wait(others, timeout=PATIENCE, count=1)
        assert refused.get() == (503, "gmux: 1 requests wait (--queue-limit)\n")
        gate.release()
        gate.release()
        others.remove(refused)
        assert first.get()[0] == others[0].get()[0] == 200


def test_queue_timeout_over_is_told_as_503_and_the_request_never_sent():
    gate = Semaphore(0)
    with Target((hold(gate), answer), HTTP) as target, Server(target, queue_timeout="200ms") as server:
        first = gevent.spawn(ask_http, server)
        wait_until(lambda: target.requests)
        begin = monotonic()
        assert ask_http(server) == (503, "gmux: no upstream connection became free within 0.2 s (--queue-timeout)\n")
        assert monotonic() - begin >= 0.19
        # The first has waited for its answer even longer: that is another clock.
        gate.release()
        assert first.get()[0] == 200
        assert len(target.requests) == 1


def test_connect_timeout_over_is_told_as_502():
    listening, filler = deaf_listener()
    address = listening.getsockname()
    with listening, filler, Server(address, protocol="http", connect_timeout="200ms") as server:
        limit = "0.2 s (--connect-timeout)"
        why = f"gmux: the target 127.0.0.1:{address[1]} did not take the connection within {limit}\n"
        assert ask_http(server) == (502, why)


def test_timeout_over_is_told_as_504_and_the_connection_ends():
    # Long enough for an answer that comes at once, however busy the machine.
    with Target(never, HTTP) as target, Server(target, timeout="1s") as server:
        begin = monotonic()
        assert ask_http(server) == (504, "gmux: the target was silent for 1 s (--timeout)\n")
        assert monotonic() - begin >= 0.99
        target.behaviour = (answer,)
        assert ask_http(server)[0] == 200
        assert target.accepted == 2


def test_timeout_starts_when_the_request_is_sent_after_the_delays():
    settings = {"connect_delay": "1200ms", "request_delay": "1200ms"}
    with Target(framing=HTTP) as target, Server(target, timeout="1s", **settings) as server:
        assert [ask_http(server)[0] for _ in range(2)] == [200, 200]


# Rests.


def test_connect_delay_first_request_comes_no_sooner_and_later_ones_at_once():
    clock = Clock()
    with Target((clock.mark, answer), greeting=(clock.mark,)) as target:
        with Server(target, connect_delay="1500ms") as server, Client(server.address) as client:
            for _ in range(5):
                client.ask(b"request")
        # A busy machine lets the target take note of the connection later than gmux.
        assert clock.gaps[0] >= 0.25
        assert sum(clock.gaps[1:]) < 4 * 1.5
        assert target.accepted == 1


def test_request_delay_is_between_answer_and_next_request_of_any_client():
    clock = Clock()
    with Target((clock.mark, answer)) as target, Server(target, request_delay="200ms") as server:
        with Client(server.address) as first, Client(server.address) as second:
            for client in (first, second):
                client.send(b"request")
            for client in (first, second):
                client.receive()
            first.ask(b"request")
        assert len(clock.gaps) == 2
        assert min(clock.gaps) >= 0.2


def test_retry_delay_is_between_attempts_and_doubles():
    pauses = (0.2, 0.4, 0.8)
    begin = monotonic()
    with Server(closed_port(), retry_delay="200ms") as server:

        def told() -> list[float]:
            return [float(line.rpartition("next attempt in ")[2][:-2]) for line in server.log if "next attempt" in line]

        wait_until(lambda: len(told()) > 3)
        # From before the first attempt to after the fourth: how late the test reads a line of the log says nothing.
        assert monotonic() - begin >= 0.75 * sum(pauses)
        # Up to a quarter shorter, and rounded.
        assert [0.75 * p - 0.051 < t < p + 0.051 for t, p in zip(told(), pauses, strict=False)] == [True] * 3


def test_retry_delay_requests_meanwhile_are_refused_without_an_attempt():
    with Server(closed_port(), protocol="http", retry_delay="25s") as server:
        wait_until(lambda: server.said("next attempt in"))
        assert {ask_http(server)[0] for _ in range(20)} == {502}
    attempts = [line for line in server.log if "next attempt in" in line]
    assert len(attempts) == 1


@pytest.mark.parametrize(("dice", "pause"), [(0.0, "8.0"), (1.0, "6.0")])
def test_retry_delay_is_up_to_a_quarter_shorter(caplog, monkeypatch, dice, pause):
    """In process: from outside, chance cannot be told from a slow machine."""
    monkeypatch.setattr("gmux.pool.random.random", lambda: dice)
    with serving(closed_port(), retry_delay="8s"):
        wait_until(lambda: f"next attempt in {pause} s" in caplog.text)


# The end of a connection.


def test_upstream_idle_timeout_over_ends_the_connection_until_the_next_request():
    with Target() as target, Server(target, upstream_idle_timeout="100ms") as server:
        with Client(server.address) as client:
            for number in (1, 2):
                assert client.ask(b"request") == b"request"
                assert target.accepted == number
                wait_until(lambda: not target.open)
        wait_until(lambda: server.said("idle for 0.1 s"))


def test_upstream_max_age_busy_connection_is_replaced_between_requests():
    with Target() as target, Server(target, upstream_max_age="100ms") as server, Client(server.address) as client:

        def ask_until_replaced() -> bool:
            assert client.ask(b"request") == b"request"
            return target.accepted > 2

        wait_until(ask_until_replaced)
        assert target.peak == 1


def test_upstream_max_age_idle_connection_is_replaced_without_a_pause():
    """The target is well: nothing is to be retried later."""
    with Target() as target, Server(target, upstream_max_age="100ms", retry_delay="20s") as server:
        wait_until(lambda: target.accepted > 2 or server.said("next attempt in"))
        assert not server.said("next attempt in")
        assert target.peak == 1


def test_upstream_max_age_over_while_the_connection_rests_replaces_it():
    with Target() as target, Server(target, upstream_max_age="200ms", request_delay="400ms") as server:
        with Client(server.address) as client:
            client.send(b"request")
            assert client.receive() == b"request"
        wait_until(lambda: target.accepted > 1)


def test_queue_limit_zero_with_a_connection_to_be_made_serves_the_request_it_is_made_for():
    with Target() as target, Server(target, queue_limit="0", pool_min="0") as server, Client(server.address) as client:
        assert client.ask(b"request") == b"request"
