"""Invariant 1: at no instant does the target see more than `pool-size` connections from gmux."""

from __future__ import annotations

import os
import random
import signal
from contextlib import ExitStack
from time import monotonic

import gevent
import pytest
from gevent import socket
from gevent.lock import Semaphore
from gevent.server import StreamServer

from gmux.folder import Folder
from gmux.net import RESET_PATIENCE
from gmux.sharing import SharedSlots
from gmux.upstream import CLOSE_TIMEOUT
from tests.support.clients import Client, tagged
from tests.support.framing import HTTP, MPU
from tests.support.service import LOG, Server, connecting_sockets, deaf_listener, serving
from tests.support.stream import Closed
from tests.support.target import Target, answer, close, every, garbage, half, hang, hold, never, pause, reset, twice
from tests.support.wait import wait_until

CYCLES = 30

FAULTS = {
    "never": never,
    "late": (pause(0.03), answer),
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
def test_budget_thirty_reconnects_target_sees_one_connection(steps):
    with Target(steps, MPU) as target, serving(target, timeout="15ms") as service:
        for n in range(CYCLES):
            with Client(service.address, MPU) as client:
                client.outcome(tagged(1, n))
            wait_until(lambda n=n: target.accepted > n + 1, what="the next connection")
            service.wait_ready()
        assert target.peak == 1


def test_budget_unsolicited_bytes_target_sees_one_connection():
    with Target() as target, serving(target) as service:
        for n in range(CYCLES):
            with Client(service.address) as client:
                client.ask(b"request")
            target.say(b"hello?\n")
            wait_until(lambda n=n: target.accepted > n + 1)
        assert target.peak == 1


def test_budget_of_three_many_clients_random_faults_target_sees_three():
    dice = random.Random(1)
    with Target(framing=MPU) as target, serving(target, timeout="20ms", pool_size="3", pool_min="0") as service:
        target.behaviour = lambda connection, request: (
            dice.choice(list(FAULTS.values())) if dice.random() < 0.2 else (answer,)
        )

        def run(number):
            for n in range(15):
                with Client(service.address, MPU) as client:
                    client.outcome(tagged(number, n))

        gevent.joinall([gevent.spawn(run, number) for number in range(30)], raise_error=True)
        wait_until(lambda: service.is_whole)
        assert target.peak == 3


def test_budget_target_slow_to_notice_the_end_sees_one_connection():
    with Target(never, fin_delay=0.3) as target, serving(target, timeout="10ms") as service:
        for n in range(3):
            with Client(service.address) as client:
                assert client.outcome(b"request") == "closed"
            wait_until(lambda n=n: target.accepted > n + 1)
        assert target.peak == 1


def test_budget_target_of_one_connection_never_refuses():
    with Target(every(2, never), limit=1) as target, serving(target, timeout="10ms") as service:
        for n in range(20):
            with Client(service.address) as client:
                client.outcome(tagged(1, n))
        assert target.refused == 0


def test_budget_connections_replaced_by_age_no_request_is_lost():
    settings = {"pool_size": "2", "upstream_max_age": "10ms"}
    with Target(limit=2) as target, serving(target, **settings) as service:

        def run(number):
            with Client(service.address) as client:
                while target.accepted < 10:
                    assert client.ask(tagged(number, 0)) == tagged(number, 0)

        gevent.joinall([gevent.spawn(run, number) for number in range(5)], raise_error=True)
        assert target.peak <= 2


def test_budget_connections_idle_too_long_are_given_up_to_the_minimum():
    settings = {"pool_size": "3", "pool_min": "1", "upstream_idle_timeout": "30ms"}
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, serving(target, **settings) as service, ExitStack() as stack:
        clients = [stack.enter_context(Client(service.address)) for _ in range(3)]
        for client in clients:
            client.send(b"at once")
        wait_until(lambda: len(target.requests) == 3)
        for _ in range(4):
            gate.release()
        for client in clients:
            assert client.receive() == b"at once"
        assert target.peak == 3
        wait_until(lambda: target.open == 1)
        assert clients[0].ask(b"later") == b"later"
        assert target.accepted == 3


def test_budget_connect_timed_out_attempt_is_taken_back():
    """An attempt that goes on in the kernel would become a connection that nobody counts."""
    listening, filler = deaf_listener()
    address = listening.getsockname()
    with listening, filler, serving(address, connect_timeout="50ms", retry_delay="20s") as service:
        with Client(service.address) as client:
            assert client.outcome(b"request") == "closed"
        assert connecting_sockets(address[1]) == 0


def test_budget_two_processes_share_one_connection_target_sees_no_other(tmp_path):
    """Who has it hands it over to who needs it, as it is; so does a reload."""
    with Target() as target, ExitStack() as stack:
        slots = [SharedSlots(Folder(tmp_path), "target", 1, "", LOG) for _ in range(2)]
        old_life = stack.enter_context(ExitStack())
        old = old_life.enter_context(serving(target, slots[0]))
        old.wait_ready()
        new = stack.enter_context(serving(target, slots[1], pool_min="0"))
        clients = [stack.enter_context(Client(service.address)) for service in (old, new)]
        for n in range(20):
            for number, client in enumerate(clients):
                assert client.ask(tagged(number, n)) == tagged(number, n)
        old_life.close()
        assert clients[1].ask(b"after") == b"after"
        assert target.peak == target.accepted == 1


def test_budget_two_busy_processes_share_one_connection_take_turns(tmp_path):
    with Target() as target, ExitStack() as stack:
        slots = [SharedSlots(Folder(tmp_path), "target", 1, "", LOG) for _ in range(2)]
        services = [stack.enter_context(serving(target, s, pool_min="0")) for s in slots]
        answered = [0, 0]

        def run(number):
            with Client(services[number].address) as client:
                while min(answered) < 50:
                    assert client.ask(tagged(number, 0)) == tagged(number, 0)
                    answered[number] += 1

        gevent.joinall([gevent.spawn(run, n % 2) for n in range(8)], raise_error=True)
        assert target.peak == target.accepted == 1


def ask_until_answered(server: Server, payload: bytes) -> None:
    def is_answered() -> bool:
        try:
            with Client(server.address) as client:
                return client.outcome(payload) == "answered"
        except OSError:
            return False

    wait_until(is_answered)


def test_budget_worker_killed_target_sees_one_connection():
    with Target(limit=1) as target, Server(target) as server:
        for n in range(3):
            ask_until_answered(server, tagged(1, n))
            (worker,) = server.workers()
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda worker=worker: server.workers() and worker not in server.workers())
        ask_until_answered(server, b"after")
        assert target.peak == 1


def test_budget_master_killed_and_service_restarted_target_sees_one_connection():
    with Target(limit=1) as target:
        with Server(target) as first:
            ask_until_answered(first, b"first")
            first.signal(signal.SIGKILL)
            # The orphan still has the connection when the next service starts.
            with Server(target) as second:
                ask_until_answered(second, b"second")
        assert target.peak == 1


def test_budget_reload_under_load_target_sees_one_connection():
    with Target(limit=1) as target, Server(target) as server:
        ask_until_answered(server, b"before")
        answered = 0

        def run(number):
            nonlocal answered
            n = 0
            while not is_over:
                n += 1
                try:
                    with Client(server.address) as client:
                        answered += client.outcome(tagged(number, n)) == "answered"
                except (OSError, Closed):
                    pass

        is_over = False
        users = [gevent.spawn(run, number) for number in range(4)]
        for _ in range(2):
            before = server.workers()
            server.signal(signal.SIGHUP)
            wait_until(lambda before=before: server.workers() and not set(before) & set(server.workers()))
            seen = answered
            wait_until(lambda seen=seen: answered > seen + 20)
        is_over = True
        gevent.joinall(users, raise_error=True)
        assert target.peak == 1


class Lingering(StreamServer):
    """A target that refuses the first request, says FIN and reads on, what there is each `seconds`.

    So does a server that closes lingeringly, for the client to get the refusal. Others it answers.
    """

    def __init__(self, seconds: float) -> None:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen(10)
        super().__init__(listening, self._serve)
        self.seconds = seconds
        self.accepted = self.open = self.peak = 0
        #: How each connection ended, as the target found out.
        self.ends: list[str] = []

    def _serve(self, sock, address):
        self.accepted += 1
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            if self.accepted == 1:
                sock.recv(100)
                sock.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    gevent.sleep(self.seconds)
            else:
                while sock.recv(65536):
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            self.ends.append("FIN")
        except OSError:
            self.ends.append("reset")
        self.open -= 1


@pytest.mark.parametrize(("seconds", "end"), [(0.0, "FIN"), (0.15, "reset")], ids=["soon", "slow"])
def test_budget_target_that_says_fin_and_reads_on_has_our_end_before_it_sees_another(seconds, end):
    target = Lingering(seconds)
    target.start()
    body = 2_000_000
    try:
        with serving(target.address, protocol="http") as service, ExitStack() as stack:
            service.wait_ready()
            refused, other = (stack.enter_context(Client(service.address, HTTP)) for _ in range(2))
            refused.send_raw(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % body + b"x" * body)
            assert b" 413 " in refused.until(b"\r\n\r\n")
            other.send_raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in other.until(b"\r\n\r\n")
            assert target.ends == [end]
            assert (target.accepted, target.peak) == (2, 1)
    finally:
        target.stop()


def test_budget_connection_that_was_reset_counts_until_a_target_that_sleeps_can_have_seen_it():
    with Target((hang,), MPU) as target, serving(target, timeout="15ms") as service:
        service.wait_ready()
        with Client(service.address, MPU) as client:
            client.outcome(b"one")
            ended = monotonic()
            wait_until(lambda: target.accepted == 2)
        assert monotonic() - ended >= CLOSE_TIMEOUT + RESET_PATIENCE - 0.05
        target.released.set()
