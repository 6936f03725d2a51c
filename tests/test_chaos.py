"""Workers, masters and reloads are killed at random under load: the target never sees one connection too many.

`make chaos` runs it for a minute.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from time import monotonic

import gevent
import pytest

from tests.support.clients import Client, tagged
from tests.support.service import Server
from tests.support.stream import Closed
from tests.support.strict_target import StrictTarget
from tests.support.wait import wait_until

SECONDS = float(os.environ.get("CHAOS_SECONDS", "6"))
POOL_SIZE = 2
SERVICES = 2
CLIENTS = 20
REQUESTS = 100


class Chaos:
    """Services that share the connections to one target, and what befalls them."""

    def __init__(self, target: StrictTarget, stack: ExitStack, dice: random.Random) -> None:
        self._target = target
        self._stack = stack
        self._dice = dice
        self.servers = [self._start() for _ in range(SERVICES)]
        self.answered = self.cut = 0
        self.gaps: list[float] = []
        self.done: dict[str, int] = {}
        self._is_over = False

    def _start(self) -> Server:
        settings = {"protocol": "echo", "pool_size": str(POOL_SIZE), "workers": "2", "queue_timeout": "5s"}
        server = self._stack.enter_context(
            Server(self._target.address, process={"start_new_session": True}, **settings)
        )
        # Also the master of an upgrade of which nobody lived to tell.
        self._stack.callback(end_session, server.pid)
        return server

    def client(self, number: int) -> None:
        """Ask on and on, wherever there is a service; every answer must be the client's own."""
        n = 0
        last = monotonic()
        while not self._is_over:
            with suppress(OSError, Closed), Client(self._dice.choice(self.servers).address) as client:
                # Not for ever: a service that was left behind keeps its clients.
                for _ in range(REQUESTS):
                    if self._is_over:
                        return
                    n += 1
                    asked = tagged(number, n)
                    got = client.ask(asked)
                    assert got == asked, f"asked {asked!r}, got {got!r}"
                    now = monotonic()
                    self.gaps.append(now - last)
                    last = now
                    self.answered += 1
                    gevent.sleep(0.001)
                continue
            self.cut += 1
            gevent.sleep(0.01)

    def run(self, seconds: float) -> None:
        end = monotonic() + seconds
        deeds: list[Callable[[Server], None]] = [
            self.kill_worker,
            self.kill_worker,
            self.reload,
            self.reload,
            self.reload_and_kill,
            self.add_worker,
            self.kill_master,
            self.upgrade,
            self.stop_worker_for_a_while,
        ]
        while monotonic() < end:
            deed = self._dice.choice(deeds)
            self.done[deed.__name__] = self.done.get(deed.__name__, 0) + 1
            server = self._dice.choice(self.servers)
            try:
                deed(server)
            except ProcessLookupError:
                self.servers[self.servers.index(server)] = self._start()
            gevent.sleep(self._dice.uniform(0.02, 0.4))
        self._is_over = True

    def kill_worker(self, server: Server) -> None:
        if workers := server.workers():
            os.kill(self._dice.choice(workers), signal.SIGKILL)

    def reload(self, server: Server) -> None:
        server.signal(signal.SIGHUP)

    def reload_and_kill(self, server: Server) -> None:
        server.signal(signal.SIGHUP)
        gevent.sleep(self._dice.uniform(0, 0.15))
        for worker in server.workers():
            if self._dice.random() < 0.5:
                os.kill(worker, signal.SIGKILL)

    def add_worker(self, server: Server) -> None:
        server.signal(self._dice.choice([signal.SIGTTIN, signal.SIGTTOU]))

    def stop_worker_for_a_while(self, server: Server) -> None:
        if workers := server.workers():
            worker = self._dice.choice(workers)
            os.kill(worker, signal.SIGSTOP)
            gevent.sleep(self._dice.uniform(0, 0.2))
            os.kill(worker, signal.SIGCONT)

    def kill_master(self, server: Server) -> None:
        """Its workers find out and drain; another service takes its place at once."""
        server.signal(signal.SIGKILL)
        self.servers[self.servers.index(server)] = self._start()

    def upgrade(self, server: Server) -> None:
        server.signal(signal.SIGUSR2)
        begin = monotonic()
        while not server.said("the new master is process"):
            if monotonic() - begin > 1:
                return  # it is busy with a reload; whatever becomes of this, both are stopped in the end
            gevent.sleep(0.001)
        gevent.sleep(self._dice.uniform(0, 1))
        # The new master may be there by now, or not: then it ends the service, and another takes its place.
        server.signal(self._dice.choice([signal.SIGTERM, signal.SIGKILL]))
        self.servers[self.servers.index(server)] = self._start()


def end_session(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)


@pytest.mark.timeout(SECONDS + 120)
def test_chaos_target_never_sees_one_connection_too_many():
    dice = random.Random(os.environ.get("CHAOS_SEED"))
    target = StrictTarget(POOL_SIZE)
    with target, ExitStack() as stack:
        chaos = Chaos(target, stack, dice)
        clients = [gevent.spawn(chaos.client, number) for number in range(CLIENTS)]
        chaos.run(SECONDS)
        gevent.joinall(clients, timeout=60, raise_error=True)
        # After it all, each service that is left serves.
        for server in chaos.servers:

            def serves(server: Server = server) -> bool:
                with suppress(OSError), Client(server.address) as client:
                    return client.outcome(b"after it all") == "answered"
                return False

            wait_until(serves, what="a service that serves again")
    gaps = sorted(chaos.gaps)
    print(
        f"\n{chaos.answered} answered, {chaos.cut} connections of clients cut, longest gap {gaps[-1]:.3f} s,"
        f" target {target.told}, deeds {chaos.done}"
    )
    assert chaos.answered > 0
    assert target.told["refused"] == 0
    assert target.told["peak"] <= POOL_SIZE
