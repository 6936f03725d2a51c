"""Reloads and an upgrade under load: no client notices, and the target sees no new connection."""

from __future__ import annotations

import os
import signal
import statistics
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from time import monotonic

import gevent
import pytest

from tests.support.clients import Client, tagged
from tests.support.framing import HTTP, LINE, MPU, Framing
from tests.support.service import Server
from tests.support.strict_target import StrictTarget
from tests.support.target import Target
from tests.support.wait import wait_until

CLIENTS = 50
RELOADS = 10


class Clients:
    """Each has one connection for the whole time, and asks on it again and again. Anything but its answer fails."""

    def __init__(self, address: tuple[str, int], framing: Framing) -> None:
        self.answered = 0
        #: The longest time that a client waited since this was last set.
        self.longest = 0.0
        self._is_over = False
        self._greenlets = [gevent.spawn(self._run, Client(address, framing), n) for n in range(CLIENTS)]

    def _run(self, client: Client, number: int) -> None:
        with client:
            for n in count():
                if self._is_over:
                    return
                payload = tagged(number, n)
                begin = monotonic()
                if client.framing is HTTP:
                    client.send_raw(b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % payload)
                    answer = client.receive()
                else:
                    answer = client.ask(payload)
                assert answer == payload, f"asked {payload!r}, got {answer!r}"
                self.longest = max(self.longest, monotonic() - begin)
                self.answered += 1
                gevent.sleep(0.001)

    def wait_answers(self, number: int) -> None:
        number += self.answered
        wait_until(lambda: self.answered >= number or any(g.exception for g in self._greenlets), what="answers")

    def end(self) -> None:
        self._is_over = True
        gevent.joinall(self._greenlets, raise_error=True)


def reload(server: Server) -> None:
    before = server.workers()
    server.signal(signal.SIGHUP)
    wait_until(lambda: server.workers() and not set(before) & set(server.workers()), what="new workers alone")


def upgrade(server: Server, pid_file: Path) -> None:
    """USR2, then TERM to the old master when the new one serves."""
    second = pid_file.with_name(pid_file.name + ".2")
    server.signal(signal.SIGUSR2)
    new = wait_until(lambda: number_in(second), what="the pid file of the new master")
    wait_until(lambda: server.workers(new), what="the workers of the new master")
    server.signal(signal.SIGTERM)
    wait_until(lambda: number_in(pid_file) == new, what="the new master in its place")


def number_in(file: Path) -> int:
    """Of a process; 0 for a file that is not there, as in the moment when the old master has removed it."""
    try:
        return int(file.read_text() or 0)
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    ("framing", "settings"),
    [
        (LINE, {}),
        (HTTP, {"pool_size": "4", "workers": "2"}),
        (MPU, {"pipeline": "16"}),
    ],
    ids=["echo strict", "http two workers", "mpu pipelined"],
)
def test_ten_reloads_and_an_upgrade_under_load_lose_nothing(framing, settings, tmp_path):
    pid_file = tmp_path / "pid"
    size = int(settings.get("pool_size", "1"))
    if framing is MPU:
        # The target answers what it gets: its answers are no ISO 8583, so they are by order.
        settings = settings | {"correlation": "order"}
    with ExitStack() as stack:
        # The strict one speaks for lines alone; it sees what a device would see.
        target = stack.enter_context(StrictTarget(size) if framing is LINE else Target(framing=framing, limit=size))
        where = target.address if framing is LINE else target
        server = stack.enter_context(Server(where, protocol=framing.protocol, pid=str(pid_file), **settings))
        clients = Clients(server.address, framing)
        clients.wait_answers(200)
        gaps = []
        for _ in range(RELOADS):
            clients.longest = 0.0
            reload(server)
            clients.wait_answers(200)
            gaps.append(clients.longest)
        clients.longest = 0.0
        upgrade(server, pid_file)
        clients.wait_answers(200)
        clients.end()
        new = int(pid_file.read_text())
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: not pid_file.exists())
    median, most = statistics.median(gaps), max(gaps)
    print(
        f"\n{framing}: {clients.answered} answered, none lost; longest wait at a reload {median:.3f} s at the median,"
        f" {most:.3f} s at most, {clients.longest:.3f} s at the upgrade"
    )
    if framing is LINE:
        assert target.told["peak"] == target.told["accepted"] == 1
        assert target.told["refused"] == 0
    else:
        assert target.refused == 0
        assert target.peak <= size
