"""What surrounds gmux and is not as it should be: its output, its environment, its files, its limits."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import gevent
import pytest
from gevent import socket

from gmux import net
from gmux.errors import ConnectError
from gmux.listener import ACCEPT_PAUSE
from gmux.slots import Grant
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client
from tests.support.framing import HTTP, LINE
from tests.support.service import ROOT, MemorySlots, Server, serving
from tests.support.target import Target, closed_port
from tests.support.wait import PATIENCE, wait_until

# Output that nobody takes.

WORDS = [["list"], ["version"], ["--help"], ["server", "--help"]]


def run_into(output: int, words: list[str]) -> tuple[int, list[str]]:
    """The exit code and what is said on stderr when stdout is `output`."""
    done = subprocess.run(
        [sys.executable, "-m", "gmux", *words], stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_output_to_a_closed_pipe_ends_without_a_traceback(words):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        code, said = run_into(writer, words)
    finally:
        os.close(writer)
    assert code in (0, 1)
    assert len(said) <= 1, said
    assert "Traceback" not in "".join(said)


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_output_to_a_full_disk_is_an_error_of_one_line(words):
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        code, said = run_into(full, words)
    finally:
        os.close(full)
    assert code == 1
    assert len(said) <= 1, said
    assert "Traceback" not in "".join(said)


# Variables and limits.


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A function: its argument is what a shell does before it becomes the `gmux server` of a `Server`."""

    def prepare(command: str) -> None:
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\n{command}\nexec {shlex.quote(sys.executable)} "$@"\n')
        script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(script))

    return prepare


VARIABLES = [
    "GUNICORN_PID=abc",
    "GUNICORN_FD=9",
    # The shell's parent is the parent of what it becomes.
    "GUNICORN_PID=$PPID GUNICORN_FD=9",
    "LISTEN_PID=$$ LISTEN_FDS=1",
    "LISTEN_PID=abc LISTEN_FDS=x",
    "WEB_CONCURRENCY=abc",
    "GUNICORN_CMD_ARGS=--bogus",
]


@pytest.mark.parametrize("variables", VARIABLES)
def test_variables_of_gunicorn_do_not_disturb_the_service(variables, shell):
    shell(f"export {variables}")
    # The address is not used: the target is the one within.
    with Server(("127.0.0.1", 1), target="embedded", protocol="echo") as server, Client(server.address) as client:
        assert client.ask(b"hello") == b"hello"
        assert not [line for line in server.log if line.startswith(("WARN", "ERRO"))]


def test_descriptors_few_service_that_cannot_start_says_one_line():
    """How many clients it would have taken is of no interest."""
    command = f"ulimit -n 64; exec {shlex.quote(sys.executable)} -m gmux server -l 192.0.2.1:8000"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT)
    said = "gmux: cannot listen on 192.0.2.1:8000: Cannot assign requested address\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_descriptors_few_service_that_starts_tells_how_many_clients_it_takes(shell):
    shell("ulimit -n 64")
    with Server(("127.0.0.1", 1), target="embedded", protocol="echo", max_clients="") as server:
        line = wait_until(lambda: server.said("descriptors are too few"))
    assert line.partition("] ")[2] == (
        "64 descriptors are too few for 12500 of clients and 36 of gmux and its targets: --max-clients is lowered from"
        " 10000 to 12; raise the limit to 12536 (ulimit -n, or LimitNOFILE= of systemd)"
    )


def test_descriptors_that_are_enough_are_not_spoken_of(shell):
    """The line says how many are."""
    shell("ulimit -n 161")
    with Server(("127.0.0.1", 1), target="embedded", protocol="echo", max_clients="101") as server:
        wait_until(lambda: server.said("raise the limit to 162 "))
    with Server(("127.0.0.1", 1), target="embedded", protocol="echo", max_clients="100") as server:
        wait_until(lambda: server.said("new target connection"))
        assert not server.said("too few")


def test_descriptors_burst_of_clients_leaves_those_of_the_target(shell):
    """All come at once, together with the end of the connection to the target."""
    shell("ulimit -n 40")
    with Target() as target, Server(target) as server, ExitStack() as stack:
        wait_until(lambda: server.said("new target connection"))
        (worker,) = server.workers()
        for n in range(3):
            os.kill(worker, signal.SIGSTOP)
            for _ in range(100):
                stack.enter_context(socket.create_connection(server.address))
            target.close_all()
            os.kill(worker, signal.SIGCONT)
            wait_until(lambda n=n: target.accepted == n + 2, what="the next connection")
        assert not server.said("Too many open files")
        wait_until(lambda: server.said("the last descriptors are for connections to the target (ulimit -n)"))


def test_descriptors_all_taken_by_clients_target_restarts_clients_are_served(shell):
    """More clients than descriptors: those that wait to be accepted must not get what a new connection needs."""
    shell("ulimit -n 64")
    with ExitStack() as stack:
        address = closed_port()
        first = stack.enter_context(Target(address=address))
        server = stack.enter_context(Server(first))
        client = stack.enter_context(Client(server.address))
        assert client.ask(b"before") == b"before"
        crowd = [stack.enter_context(Client(server.address)) for _ in range(80)]
        # Several times, as the loop may meet a client or the target first.
        for n in range(3):
            first.close_all()
            wait_until(lambda n=n: first.accepted >= n + 2, what="the next connection")
        assert client.ask(b"between") == b"between"
        first.close()
        first.close_all()
        # Away for longer than the listener pauses, so that it accepts while there is no connection to the target.
        gevent.sleep(4 * ACCEPT_PAUSE)
        second = stack.enter_context(Target(address=address))
        wait_until(lambda: second.accepted, what="a connection to the target that is back")
        assert client.ask(b"after") == b"after"
        assert crowd


# Slots and connects that fail in ways of their own.


ODD_ERRORS = [RuntimeError("odd"), OSError(5, "odd"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd")]


class FailingSlots(MemorySlots):
    """Raises `error` as long as it is set."""

    error: Exception | None = None

    def acquire(self) -> Grant | None:
        if self.error is not None:
            raise self.error
        return super().acquire()


def assert_recovers(service, target: Target, repair) -> None:
    """Clients are refused at once while it fails, not after `queue-timeout`, and served when it does not any more."""
    for _ in range(3):
        with Client(service.address) as client:
            assert client.outcome(b"in vain") == "closed"
    assert not target.accepted
    repair()

    def is_answered() -> bool:
        with Client(service.address) as client:
            return client.outcome(b"request") == "answered"

    wait_until(is_answered, what="an answer after the repair")


@pytest.mark.parametrize("error", ODD_ERRORS, ids=repr)
def test_keeper_of_slots_that_fails_oddly_clients_are_refused_and_it_is_tried_again(error):
    slots = FailingSlots(1)
    slots.error = error
    with Target() as target, serving(target, slots) as service:
        assert_recovers(service, target, lambda: setattr(slots, "error", None))


@pytest.mark.parametrize("error", ODD_ERRORS, ids=repr)
def test_connect_that_fails_oddly_clients_are_refused_and_it_is_tried_again(error, monkeypatch):
    def connect(address, seconds):
        raise error

    with Target() as target, monkeypatch.context() as patch:
        patch.setattr(net, "connect", connect)
        with serving(target) as service:
            assert_recovers(service, target, patch.undo)


def test_connect_that_meets_itself_is_a_target_that_is_down(monkeypatch):
    """The kernel may pick the very port that nobody listens at for the attempt: gmux would answer its own requests."""

    def meet_itself(address):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.connect(address)
        return sock

    address = closed_port()
    with monkeypatch.context() as patch, serving(address) as service:
        patch.setattr(net.gevent_socket, "create_connection", meet_itself)
        with Client(service.address) as client:
            assert client.outcome(b"in vain") == "closed"
        # It keeps the port from nobody.
        patch.undo()
        with Target(address=address) as target:
            service.wait_ready()
            assert target.accepted == 1


def test_keeper_of_slots_that_fails_oddly_idle_service_tries_again_by_itself():
    """Nobody asks: the connection that is to be kept is made when it can be."""
    slots = FailingSlots(1)
    slots.error = ConnectError("of the usual kind")
    with Target() as target, serving(target, slots) as service:
        wait_until(lambda: service.pool._failures >= 2)
        slots.error = RuntimeError("odd")
        failures = service.pool._failures
        wait_until(lambda: service.pool._failures >= failures + 2)
        slots.error = None
        service.wait_ready()
        assert target.accepted == 1


# A worker that is killed.


def unsent(port: int) -> int:
    """Bytes on this machine that are on their way to `port` and not taken, in the kernel of the sender."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[0], 16) for row in rows if row[2].endswith(f":{port:04X}"))


def taken_before_reset(connection) -> int:
    """Bytes that come before a reset; any other end fails."""
    size = 0
    while True:
        try:
            data = connection.recv(64 * 1024)
        except ConnectionResetError:
            return size
        assert data, f"closed in good order behind {size} bytes"
        size += len(data)


MEGABYTES = 6 << 20
POSTS = {
    "echo": (LINE, b"x" * MEGABYTES + b"\n"),
    "http": (HTTP, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % MEGABYTES + bytes(MEGABYTES)),
}


@pytest.mark.parametrize(("framing", "request_"), POSTS.values(), ids=POSTS)
def test_budget_worker_killed_with_a_request_unsent_old_connection_is_reset(framing, request_):
    """Else the target still reads megabytes from the old connection while it has the new one (invariant 1)."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        listening.settimeout(PATIENCE)
        address = listening.getsockname()
        server = stack.enter_context(Server(address, protocol=framing.protocol))
        old = stack.enter_context(listening.accept()[0])
        client = stack.enter_context(Client(server.address, framing))
        client.send_raw(request_)
        wait_until(lambda: unsent(address[1]) > 1 << 20, what="bytes that the target does not take")
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        new = stack.enter_context(listening.accept()[0])
        old.settimeout(PATIENCE)
        assert taken_before_reset(old) < 1 << 20
        new.close()


def test_worker_that_hangs_at_once_is_watched_from_the_start():
    """The arbiter looks at the time that a worker writes on a file of its own: at first that is the wall clock's."""
    with Target() as target, Server(target) as server, Client(server.address) as client:
        assert client.ask(b"hello") == b"hello"
        (worker,) = server.workers()
        files = [link for link in Path(f"/proc/{worker}/fd").iterdir() if "wgunicorn-" in os.readlink(link)]
        assert files
        assert all(link.stat().st_mtime <= monotonic() for link in files)
