"""One route is attacked, by a crowd of clients or by its target, and another route is served all the same.

`make hostile` runs it. Throughput and answer times of the other route are compared with those beside the same attack
past gmux, its clients connected to its target: so the processor time that the attackers take does not count
against gmux.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import gevent
import pytest

from loadtest.load import Load
from tests.support.attacks import ATTACKS
from tests.support.clients import Client
from tests.support.closed_loop import allow_descriptors, measure
from tests.support.hostile import Attackers, attacked_route, good_target, route, service
from tests.support.service import Server, title
from tests.support.target import Target, closed_port, pause
from tests.support.target import answer as answers
from tests.support.wait import wait_until

SECONDS = float(os.environ.get("HOSTILE_SECONDS") or 0)

pytestmark = [
    pytest.mark.skipif(not SECONDS, reason="takes minutes and a quiet machine: make hostile"),
    pytest.mark.timeout(SECONDS * 10 + 120),
]

#: What is left of the other route's throughput, where the attack is slow and where it is as fast as it can be.
SHARES = {"limited": 0.8, "full": 0.5}
#: How much longer its slowest answers may take.
DELAY = 5


def beside(name: str, limit: float, folder: Path, is_through_gmux: bool) -> tuple[Load, float]:
    """What the one client of the other route sees, and the bytes a second of the attack, through gmux or past it."""
    attack = ATTACKS[name]
    listen, target = closed_port(), closed_port()
    limits = {side: limit if side == attack.attacker else 0.0 for side in ("clients", "target")}
    with ExitStack() as stack:
        attackers = {}
        if attack.target is None and is_through_gmux:
            target = stack.enter_context(good_target(folder, "attacked"))
        else:
            attackers["target"] = stack.enter_context(Attackers(name, "target", target, limits["target"]))
        other = closed_port()
        routes = {listen: attacked_route(name, listen, target)}
        routes[other] = route(other, stack.enter_context(good_target(folder, "other")), name="other", protocol="http")
        stack.enter_context(service(folder, routes))
        where = listen if is_through_gmux else target
        attackers["clients"] = stack.enter_context(Attackers(name, "clients", where, limits["clients"]))
        gevent.sleep(0.5)
        seen = measure("http", other, 1, SECONDS)
    return seen, attackers[attack.attacker].sent


@pytest.mark.parametrize("rate", SHARES)
@pytest.mark.parametrize("name", ATTACKS)
def test_other_route_keeps_its_share(name, rate, tmp_path):
    limit = ATTACKS[name].limit if rate == "limited" else 0.0
    under, sent = beside(name, limit, tmp_path, True)
    # No faster than gmux took it: past gmux, the attackers would be held up by nobody, and take all processors.
    alone, past = beside(name, max(sent, 1.0), tmp_path, False)
    share, delay = under.rate / alone.rate, under.p99 / alone.p99
    print(
        f"\n{name:28} {rate:8} sent {sent / 1e6:8.3f} MB/s, past gmux {past / 1e6:8.3f} |"
        f" {alone.rate:6.0f} -> {under.rate:6.0f} a second, {share:5.0%} |"
        f" p99 {alone.p99 / 1e3:6.2f} -> {under.p99 / 1e3:8.2f} ms, {delay:6.1f} times"
    )
    assert (under.errors, under.wrong) == (0, 0)
    assert share >= SHARES[rate]
    assert delay <= DELAY


@pytest.mark.parametrize("pipeline", ["1", "64"], ids=["strict", "pipelined"])
def test_slowest_of_4000_clients_waits_no_more_than_twice_as_long(pipeline, tmp_path):
    allow_descriptors()
    with (
        good_target(tmp_path, "target", protocol="echo") as target,
        Server(target, protocol="echo", pipeline=pipeline, max_clients="5000") as server,
    ):
        seen = measure("echo", server.address, 4000, max(10.0, SECONDS))
    print(f"\n4,000 clients, {pipeline} in flight: {seen.rate:.0f} a second, p50 {seen.p50 / 1e3:.0f} ms,", end=" ")
    print(f"p99 {seen.p99 / 1e3:.0f} ms, {seen.p99 / seen.p50:.2f} times; errors {seen.errors}")
    assert (seen.errors, seen.wrong) == (0, 0)
    assert seen.p99 <= 2 * seen.p50


def test_requests_of_one_turn_are_served_in_the_order_of_connecting():
    """The worker stands still while they come, so that it finds all of them at once."""
    asked = [b"%d" % n for n in range(10)]
    with Target((pause(0.01), answers)) as target, Server(target) as server, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in asked]
        for client in clients:
            client.ask(b"here")
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: "T (stopped)" in Path(f"/proc/{worker}/status").read_text(), what=title(worker))
        for client, text in zip(clients, asked, strict=True):
            client.send(text)
        os.kill(worker, signal.SIGCONT)
        assert [client.receive() for client in clients] == asked
        print(f"\n10 requests of one turn were served as {b' '.join(target.requests[10:]).decode()}")
        assert target.requests[10:] == asked
