"""Unix sockets at both ends of gmux: the file of a listener, connections to a target, and what goes over them."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gevent
import pytest
from gevent import subprocess

from gmux import net
from gmux.errors import ConnectError, ConnectTimeout, StartError
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client, tagged
from tests.support.framing import HTTP, LINE, MPU
from tests.support.programs import program, running
from tests.support.service import Server, serving
from tests.support.stream import Closed
from tests.support.target import Target, answer, close, garbage, half, listen_unix, never, padded, send
from tests.support.wait import wait_until

CYCLES = 30


@pytest.fixture
def here(tmp_path) -> str:
    """Where gmux listens."""
    return str(tmp_path / "gmux.sock")


@pytest.fixture
def there(tmp_path) -> str:
    """Where the target listens."""
    return str(tmp_path / "target.sock")


@contextmanager
def without_rights() -> Iterator[None]:
    """As an ordinary user: root may write everywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def leave_stale(path: str) -> None:
    """A socket whose process did not remove it."""
    listen_unix(path).close()


def cannot_listen(path: str, **settings) -> str:
    with pytest.raises(StartError) as caught:
        net.listen(path, **settings)
    said = str(caught.value)
    assert said.startswith(f"cannot listen on unix:{path}: ")
    assert "\n" not in said
    return said.removeprefix(f"cannot listen on unix:{path}: ")


# The file of a listener.


def test_listen_stale_file_is_replaced(here):
    leave_stale(here)
    with net.listen(here), Client(here) as client:
        assert client.sock.getpeername() == here


def test_listen_stale_file_that_another_replaces_meanwhile_is_in_use(here, monkeypatch):
    leave_stale(here)
    monkeypatch.setattr(net.SocketFile, "is_there", lambda file: False)
    assert cannot_listen(here) == "Address already in use"
    assert Path(here).is_socket()


@pytest.mark.parametrize("backlog", [50, 0], ids=["with room", "full"])
def test_listen_where_somebody_listens_is_refused(here, backlog):
    with listen_unix(here, backlog) as other, Client(here):
        assert cannot_listen(here) == "Address already in use"
        assert Path(here).is_socket()
        assert other.getsockname() == here


def test_listen_where_datagrams_go_is_refused(here):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(here)
        assert cannot_listen(here) == "Address already in use"
        assert Path(here).is_socket()


def test_listen_where_nobody_may_find_out_who_listens_is_refused(here):
    with net.listen(here, 0o000), without_rights():
        assert cannot_listen(here) == "Permission denied"


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("stale")])
def test_listen_file_of_another_kind_stays(here, tmp_path, make):
    leave_stale(str(tmp_path / "stale"))
    make(Path(here))
    before = os.lstat(here)
    assert cannot_listen(here) == "a file that is not a socket is there"
    assert os.path.samestat(before, os.lstat(here))


def test_listen_folder_missing_is_told(tmp_path):
    assert cannot_listen(str(tmp_path / "none" / "gmux.sock")) == "No such file or directory"


def test_listen_folder_without_permission_is_told(here, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with without_rights():
            assert cannot_listen(here) == "Permission denied"
    finally:
        tmp_path.chmod(0o700)


def test_listen_path_too_long_is_told(tmp_path):
    assert "too long" in cannot_listen(str(tmp_path / ("x" * 108)))


@pytest.mark.parametrize("umask", [0, 0o777])
@pytest.mark.parametrize("mode", [0, 0o600, 0o660, 0o666])
def test_listen_mode_is_the_one_given_whatever_the_umask(here, umask, mode):
    usual = os.umask(umask)
    try:
        with net.listen(here, mode):
            assert mode_of(here) == mode
        assert os.umask(umask) == umask
    finally:
        os.umask(usual)


def test_listen_nobody_connects_before_the_file_has_its_mode_and_owner(here, monkeypatch):
    seen = []
    monkeypatch.setattr(net, "_give", lambda path, owner: seen.append((mode_of(path), connecting(path))))
    with net.listen(here, 0o600, (os.geteuid(), -1)):
        assert seen == [(0o600, errno.ECONNREFUSED)]
        assert connecting(here) == 0


def connecting(path: str) -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path)


def test_listen_owner_that_cannot_be_set_leaves_nothing(here, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", refuse)
    said = cannot_listen(here, owner=(1, 1))
    assert said == "cannot change its owner (--listen-owner): Operation not permitted"
    assert not Path(here).exists()


def test_listen_two_start_at_once_the_one_without_the_file_is_told(here, monkeypatch):
    """Between bind and listen a socket looks as if it was left behind."""
    others = []

    def give(path, owner):
        monkeypatch.undo()
        others.append(net.listen(here))

    monkeypatch.setattr(net, "_give", give)
    assert cannot_listen(here, owner=(-1, -1)) == "Address already in use"
    assert connecting(here) == 0
    others[0].close()


def test_file_that_another_has_made_since_stays(here):
    with net.listen(here):
        file = net.SocketFile(here)
        os.unlink(here)
        file.remove()
        with net.listen(here):
            file.remove()
            assert Path(here).is_socket()
            net.SocketFile(here).remove()
            assert not Path(here).exists()


# Connections to a target.


def cannot_connect(path: str) -> str:
    with pytest.raises(ConnectError) as caught:
        net.connect(path, 1.0)
    return str(caught.value).removeprefix(f"cannot connect to the target unix:{path}: ")


def test_connect_without_a_listener_tells_why(there):
    assert cannot_connect(there) == "No such file or directory"
    leave_stale(there)
    assert cannot_connect(there) == "Connection refused"


def test_connect_without_permission_tells_why(there):
    with net.listen(there, 0o000), without_rights():
        assert cannot_connect(there) == "Permission denied"


def test_connect_waits_while_the_backlog_is_full(there):
    with listen_unix(there, 0) as listening, Client(there):
        attempt = gevent.spawn(net.connect, there, 20.0)
        gevent.sleep(0.05)  # the other greenlets run meanwhile
        assert not attempt.ready()
        listening.accept()
        attempt.get().close()


def test_connect_backlog_full_for_too_long_is_a_timeout_and_leaves_nothing_open(there):
    with listen_unix(there, 0), Client(there):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ConnectTimeout, match=r"did not take the connection within 0.05 s \(--connect-timeout\)"):
            net.connect(there, 0.05)
        assert os.listdir("/proc/self/fd") == before


def test_target_whose_backlog_is_full_for_a_moment_is_not_down(there, caplog):
    with ExitStack() as stack:
        listening = stack.enter_context(listen_unix(there, 0))
        stack.enter_context(Client(there))
        service = stack.enter_context(serving(there, retry_delay="1h"))
        client = stack.enter_context(Client(service.address))
        client.send(b"request")
        wait_until(lambda: service.pool.need())
        listening.accept()
        connection, _ = listening.accept()
        stack.enter_context(connection)
        assert connection.recv(100) == b"request\n"
        connection.sendall(b"answer\n")
        assert client.receive() == b"answer"
    assert "next attempt in" not in caplog.text


def test_target_whose_backlog_stays_full_is_tried_again(there):
    with listen_unix(there, 0) as listening, Client(there), serving(there, connect_timeout="50ms") as service:
        with Client(service.address) as client:
            assert client.outcome(b"request") == "closed"
        listening.accept()
        service.wait_ready()


# What goes over them.


@contextmanager
def both_ends(here: str, target: Target, **settings: str) -> Iterator[Server]:
    with Server(target, listen=f"unix:{here}", **settings) as server:
        assert server.address == here
        yield server


def test_server_both_ends_are_named_by_path_and_process(here, there):
    with Target(address=there) as target, both_ends(here, target) as server:
        with Client(here) as client:
            assert client.ask(b"hello") == b"hello"
            assert server.said("#1: ").endswith(f"#1: unix:{here} (process {os.getpid()})")
        wait_until(lambda: server.said("closed: ").endswith(f"closed: unix:{here} (process {os.getpid()})"))
        said = server.said("new target connection")
        assert said.endswith(f"new target connection: unix:{there} (process {os.getpid()})")


def test_server_file_stays_as_long_as_the_service_and_goes_with_it(here):
    with Target() as target, both_ends(here, target) as server:
        made = os.lstat(here)
        wait_until(server.workers)
        for number in (signal.SIGKILL, signal.SIGHUP):
            before = server.workers()
            os.kill(before[0] if number == signal.SIGKILL else server.pid, number)
            wait_until(lambda before=before: server.workers() and not set(before) & set(server.workers()))
            with Client(here) as client:
                assert client.ask(b"hello") == b"hello"
            assert os.path.samestat(made, os.lstat(here))
        assert server.stop() == 0
        assert not Path(here).exists()


def test_server_ends_well_when_its_file_is_gone_or_another(here):
    with Target() as target:
        with both_ends(here, target) as server:
            wait_until(server.workers)
            os.unlink(here)
            assert server.stop() == 0
        with both_ends(here, target) as server:
            wait_until(server.workers)
            os.unlink(here)
            with net.listen(here):
                assert server.stop() == 0
                assert Path(here).is_socket()


def test_server_where_another_listens_says_so_in_one_line(here):
    with Target() as target, both_ends(here, target):
        words = [sys.executable, "-m", "gmux", "server", "-l", f"unix:{here}"]
        done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"gmux: cannot listen on unix:{here}: Address already in use\n"


def curl(path: str, *words: str) -> bytes:
    fixed = ["-q", "--silent", "--show-error", "--max-time", "50", "--unix-socket", path]
    done = subprocess.run([program("curl"), *fixed, *words], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@contextmanager
def gunicorn(path: str) -> Iterator[None]:
    words = ["--worker-class=gthread", "--no-control-socket", "tests.peers.targets.wsgi_app:application"]
    with running([sys.executable, "-m", "gunicorn", f"--bind=unix:{path}", *words]) as process:
        wait_until(lambda: process.poll() is not None or (Path(path).exists() and not connecting(path)), 20.0)
        yield


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [("forwarded", "Forwarded", 'for=unknown;host="asked";proto=http'), ("x-forwarded", "X-Forwarded-For", "unknown")],
)
def test_curl_through_gmux_to_gunicorn_all_over_unix_sockets(here, there, form, name, value):
    with gunicorn(there), Server(there, protocol="http", listen=f"unix:{here}", forwarded=form):
        told = json.loads(curl(here, "http://asked/tell"))
        assert dict(told["fields"])[name] == value
        body = random.Random(1).randbytes(3 << 20)
        Path(here + ".body").write_bytes(body)
        assert curl(here, "--data-binary", f"@{here}.body", "http://asked/") == body


def test_http_1_0_without_a_host_asks_a_unix_target_for_localhost(here, there):
    heads = []

    def note(connection, request):
        heads.append(request)
        return (answer,)

    with Target(note, HTTP, address=there) as target, both_ends(here, target), Client(here, HTTP) as client:
        client.send_raw(b"GET /it HTTP/1.0\r\n\r\n")
        assert client.receive() == b"it"
    assert b"\r\nHost: localhost\r\n" in heads[0]


# The invariants.


FAULTS = {
    "never": never,
    "half then silence": (half,),
    "half then close": (half, close),
    "garbage": (garbage,),
    "close": (close,),
    "answer then close": (answer, close),
}


@pytest.mark.parametrize("steps", FAULTS.values(), ids=FAULTS)
def test_budget_thirty_reconnects_target_sees_one_connection(there, steps):
    with Target(steps, MPU, address=there) as target, serving(target, timeout="15ms") as service:
        for n in range(CYCLES):
            with Client(service.address, MPU) as client:
                client.outcome(tagged(1, n))
            wait_until(lambda n=n: target.accepted > n + 1, what="the next connection")
            service.wait_ready()
        assert target.peak == 1


def test_budget_worker_killed_in_its_requests_target_sees_one_connection(here, there):
    with Target(never, limit=1, address=there) as target, both_ends(here, target) as server:
        for n in range(1, 6):
            with Client(here) as client:
                client.send(b"x" * 100_000)
                wait_until(lambda n=n: len(target.requests) == n, what="a request under way")
                (worker,) = server.workers()
                os.kill(worker, signal.SIGKILL)
                assert client.outcome(b"") == "closed"
            wait_until(lambda worker=worker: server.workers() and worker not in server.workers())
        assert (target.peak, target.refused) == (1, 0)


def test_answers_many_clients_and_faults_reach_only_their_client(here, there):
    dice = random.Random(7)
    settings = {"listen": f"unix:{here}", "timeout": "30ms", "pool_size": "2"}
    with Target(framing=MPU, limit=2, address=there) as target, serving(target, **settings) as service:
        assert service.address == here
        target.behaviour = lambda connection, request: (
            dice.choice(list(FAULTS.values())) if dice.random() < 0.1 else (answer,)
        )
        outcomes = []

        def run(number):
            for n in range(20):
                with Client(here, MPU) as client:
                    outcomes.append(client.outcome(tagged(number, n)))

        gevent.joinall([gevent.spawn(run, number) for number in range(40)], raise_error=True)
        assert outcomes.count("answered") > 400
        assert (target.peak, target.refused) == (2, 0)


@pytest.mark.parametrize("leave", [lambda c: c.send_half(b"lost"), lambda c: c.send(b"lost")], ids=["in it", "behind"])
def test_client_gone_in_its_request_connection_stays(here, there, leave):
    with Target(address=there) as target, serving(target, listen=f"unix:{here}") as service:
        for n in range(10):
            client = Client(here)
            leave(client)
            client.vanish("fin")
            with Client(here) as other:
                assert other.ask(tagged(2, n)) == tagged(2, n)
        service.wait_clients(0)
        assert target.accepted == 1


def test_slow_client_holds_up_nobody_and_gets_its_whole_answer(here, there):
    size = 8 << 20
    with Target(address=there) as target, serving(target, listen=f"unix:{here}") as service:
        target.behaviour = lambda connection, request: (padded(size),) if request == b"big\n" else (answer,)
        with Client(here) as slow, Client(here) as other:
            slow.send(b"big")
            wait_until(lambda: any(client._outbox for client in service.clients), what="an answer that is held")
            for n in range(20):
                assert other.ask(tagged(1, n)) == tagged(1, n)
            assert slow.receive() == b"big".ljust(size, b".")


def test_client_that_ends_its_side_takes_its_last_answer_as_late_as_it_likes(here, there):
    """What was written is the client's, even when gmux has closed: nothing can take it back."""
    request = b"GET /it HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with ExitStack() as stack:
        target = stack.enter_context(Target(framing=HTTP, address=there))
        service = stack.enter_context(serving(target, listen=f"unix:{here}"))
        client = stack.enter_context(Client(here, HTTP))
        client.send_raw(request + b"more than one request")
        wait_until(lambda: target.requests)
        service.wait_clients(0)
        assert client.receive() == b"it"


def test_answer_broken_off_ends_its_client_with_half_of_it(here, there):
    """There is no reset here: the length tells that it is not whole."""
    begun = send(HTTP.wrap(bytes(1 << 20))[: 1 << 19])
    with ExitStack() as stack:
        target = stack.enter_context(Target((begun, close), HTTP, address=there))
        stack.enter_context(serving(target, listen=f"unix:{here}"))
        client = stack.enter_context(Client(here, HTTP))
        client.send_raw(b"GET /it HTTP/1.1\r\nHost: a\r\n\r\n")
        with pytest.raises(Closed) as caught:
            client.receive()
        assert not caught.value.is_reset


def test_idle_connection_that_the_target_closed_is_noticed_before_a_request(there):
    with Target(address=there) as target, serving(target) as service, Client(service.address) as client:
        for n in range(CYCLES):
            assert client.ask(tagged(1, n)) == tagged(1, n)
            target.close_all()
        assert set(target.times().values()) == {1}
        assert target.peak == 1


@pytest.mark.parametrize("settings", [{"pipeline": "8"}, {"pool_size": "3"}], ids=str)
def test_several_in_flight_over_unix_sockets_are_answered_each_to_its_own(here, there, settings):
    with Target(framing=LINE, address=there) as target, serving(target, listen=f"unix:{here}", **settings):

        def run(number):
            with Client(here) as client:
                for n in range(30):
                    assert client.ask(tagged(number, n)) == tagged(number, n)

        gevent.joinall([gevent.spawn(run, number) for number in range(20)], raise_error=True)
        assert target.peak <= 3
