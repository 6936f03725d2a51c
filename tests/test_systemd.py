"""systemd, played by a socket that is told the state of the service, and by sockets that the service starts with."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from time import monotonic

import gevent
import pytest
from gevent import socket
from gevent.lock import Semaphore

from gmux.settings import SETTINGS
from tests.support.clients import Client
from tests.support.service import ROOT, Server
from tests.support.target import Target, answer, hold
from tests.support.wait import wait_until
from tests.test_signals import upgrade, wait_said


class Systemd:
    """Takes what a service tells. Use it in a `with`."""

    def __init__(self, path) -> None:
        self.messages: list[str] = []
        self.times: list[float] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._path = str(path)

    def __enter__(self) -> Systemd:
        self._reading = gevent.spawn(self._read)
        return self

    def __exit__(self, *exc: object) -> None:
        self._reading.kill()
        self._socket.close()

    def process(self, **variables: str) -> dict:
        """What a process is started with that is to tell."""
        return {"env": os.environ | {"NOTIFY_SOCKET": self._path} | variables, "start_new_session": True}

    def said(self, text: str) -> list[int]:
        return [n for n, message in enumerate(self.messages) if text in message]

    def wait(self, text: str, number: int = 1) -> None:
        wait_until(lambda: len(self.said(text)) >= number, what=f"{text!r} among {self.messages}")

    def _read(self) -> None:
        while True:
            self.messages.append(self._socket.recv(4096).decode())
            self.times.append(monotonic())


@pytest.fixture
def systemd(tmp_path):
    with Systemd(tmp_path / "notify") as systemd:
        yield systemd


# What it is told.


def test_ready_is_told_when_clients_can_connect_and_the_end_when_it_begins(systemd):
    with Target() as target, Server(target, process=systemd.process()) as server:
        systemd.wait("READY=1")
        with Client(server.address) as client:
            assert client.ask(b"hello") == b"hello"
        systemd.wait("STATUS=listening on 127.0.0.1:")
        assert not [m for m in systemd.messages if "unicorn" in m]
        assert not systemd.said("STOPPING=1")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        systemd.wait("STOPPING=1")
        assert not systemd.said("MAINPID")
        assert not systemd.said("WATCHDOG")


def test_reload_is_told_from_begin_to_end(systemd):
    with Target() as target, Server(target, process=systemd.process()) as server:
        wait_said(server, "started")
        before = monotonic()
        server.signal(signal.SIGHUP)
        systemd.wait("READY=1", 2)
        (begin,) = systemd.said("RELOADING=1")
        assert begin < systemd.said("READY=1")[-1]
        (told,) = re.findall(r"^RELOADING=1\nMONOTONIC_USEC=(\d+)$", systemd.messages[begin])
        assert before <= int(told) / 1e6 <= monotonic()


def test_upgrade_names_the_new_master_before_the_old_one_ends_and_is_no_stop(systemd):
    with Target() as target, Server(target, process=systemd.process()) as server:
        wait_said(server, "started")
        new = upgrade(server)
        server.signal(signal.SIGTERM)
        server.wait_master()
        systemd.wait(f"MAINPID={new}", 2)
        assert not systemd.said("STOPPING=1")


def test_upgrade_taken_back_is_no_stop(systemd):
    with Target() as target, Server(target, process=systemd.process()) as server:
        wait_said(server, "started")
        os.kill(upgrade(server), signal.SIGTERM)
        wait_said(server, "this one goes on")
        assert not systemd.said("STOPPING=1")
        assert not systemd.said("MAINPID")


# The watchdog.


def test_watchdog_is_fed_also_while_a_reload_and_a_stop_wait(systemd):
    gate = Semaphore(0)
    process = systemd.process(WATCHDOG_USEC="400000")
    with (
        Target((hold(gate), answer)) as target,
        Server(target, process=process) as server,
        Client(server.address) as client,
    ):
        systemd.wait("WATCHDOG=1", 3)
        client.send(b"request")
        wait_until(lambda: target.requests)
        server.signal(signal.SIGHUP)
        systemd.wait("RELOADING=1")
        systemd.wait("WATCHDOG=1", len(systemd.said("WATCHDOG=1")) + 3)
        server.signal(signal.SIGTERM)
        systemd.wait("STOPPING=1")
        systemd.wait("WATCHDOG=1", len(systemd.said("WATCHDOG=1")) + 3)
        gate.release()
        assert client.receive() == b"request"
        assert server.wait() == 0


@pytest.mark.parametrize("variables", [{"WATCHDOG_USEC": "20s"}, {"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}])
def test_watchdog_of_another_process_or_with_a_bad_time_is_not_fed(systemd, variables):
    with Target() as target, Server(target, process=systemd.process(**variables)) as server:
        wait_said(server, "started")
        server.signal(signal.SIGHUP)
        systemd.wait("READY=1", 2)
        assert not systemd.said("WATCHDOG")


def test_watchdog_is_fed_by_the_new_master_after_an_upgrade(systemd, tmp_path, monkeypatch):
    """The variable names the old master as the one who is to feed it."""
    launch(monkeypatch, tmp_path, WATCHDOG_PID="OWN")
    with Target() as target, Server(target, process=systemd.process(WATCHDOG_USEC="400000")) as server:
        wait_said(server, "started")
        new = upgrade(server)
        server.signal(signal.SIGTERM)
        server.wait_master()
        systemd.wait(f"MAINPID={new}", 2)
        systemd.wait("WATCHDOG=1", len(systemd.said("WATCHDOG=1")) + 3)


# Sockets that it hands over.


def launch(monkeypatch, folder, sockets=(), **variables: str) -> dict:
    """Let processes start with `sockets` as descriptors from 3 on, and with variables; OWN stands for their own id."""
    script = folder / "launcher"
    script.write_text(
        f"#!{sys.executable}\n"
        "import fcntl, os, sys\n"
        f"fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in {[sock.fileno() for sock in sockets]}]\n"
        "for n, fd in enumerate(fds, 3):\n"
        "    os.dup2(fd, n)\n"
        f"for name, value in {variables!r}.items():\n"
        "    os.environ[name] = value.replace('OWN', str(os.getpid()))\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    return {"pass_fds": [sock.fileno() for sock in sockets], "start_new_session": True}


@pytest.fixture
def sockets():
    """Two that listen, as systemd makes them."""
    with ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(2)]
        for sock in made:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
        yield made


ROUTES = """
[defaults]
target = "{}:{}"
[[route]]
name = "one"
listen = "127.0.0.1:0"
[[route]]
name = "two"
listen = "127.0.0.1:0"
"""


def configure(tmp_path, target: Target) -> dict[str, str]:
    file = tmp_path / "gmux.toml"
    file.write_text(ROUTES.format(target.server_host, target.server_port))
    return {"config": str(file), "target": "", "listen": "", "protocol": ""}


def told(server: Server, route: str) -> int:
    wait_said(server, f"{route}: listening on")
    return int(server.said(f"{route}: listening on").rpartition(":")[2])


def test_sockets_go_to_the_routes_of_their_names_and_stay_over_reload_and_upgrade(monkeypatch, tmp_path, sockets):
    ports = {name: sock.getsockname()[1] for name, sock in zip(("two", "one"), sockets, strict=True)}
    process = launch(monkeypatch, tmp_path, sockets, LISTEN_PID="OWN", LISTEN_FDS="2", LISTEN_FDNAMES="two:one")
    with Target() as target, Server(target, process=process, **configure(tmp_path, target)) as server:
        assert {name: told(server, name) for name in ports} == ports
        wait_said(server, "worker")

        def ask(client: int) -> None:
            for port in ports.values():
                with Client(("127.0.0.1", port)) as asking:
                    assert asking.ask(b"request %d" % client) == b"request %d" % client

        ask(1)
        server.signal(signal.SIGHUP)
        wait_said(server, "reloaded")
        ask(2)
        upgrade(server)
        server.signal(signal.SIGTERM)
        wait_said(server, "this one takes its place")
        ask(3)


def test_socket_of_one_route_is_enough_and_the_other_opens_its_own(monkeypatch, tmp_path, sockets):
    process = launch(monkeypatch, tmp_path, sockets[:1], LISTEN_PID="OWN", LISTEN_FDS="1", LISTEN_FDNAMES="two")
    with Target() as target, Server(target, process=process, **configure(tmp_path, target)) as server:
        assert told(server, "two") == sockets[0].getsockname()[1]
        assert told(server, "one") not in (0, sockets[0].getsockname()[1])


def test_socket_without_a_fitting_name_goes_to_the_route_of_its_address(monkeypatch, tmp_path, sockets):
    process = launch(monkeypatch, tmp_path, sockets[:1], LISTEN_PID="OWN", LISTEN_FDS="1", LISTEN_FDNAMES="gmux.socket")
    with Target() as target:
        settings = configure(tmp_path, target)
        file = tmp_path / "gmux.toml"
        port = sockets[0].getsockname()[1]
        head, _, tail = file.read_text().rpartition("127.0.0.1:0")
        file.write_text(f"{head}localhost:{port}{tail}")
        with Server(target, process=process, **settings) as server:
            assert told(server, "two") == port


def test_only_socket_goes_to_the_only_route(monkeypatch, tmp_path, sockets):
    process = launch(monkeypatch, tmp_path, sockets[:1], LISTEN_PID="OWN", LISTEN_FDS="1")
    with Target() as target, Server(target, process=process) as server, Client(server.address) as client:
        assert server.address == sockets[0].getsockname()
        assert client.ask(b"hello") == b"hello"


def start_in_vain(process: dict, *words: str) -> str:
    """The one line of a service that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "gmux", "server", "-p", "echo", "-t", "127.0.0.1:1", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        **process,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_socket_that_fits_no_route_is_an_error_that_says_how_to_name_it(monkeypatch, tmp_path, sockets):
    process = launch(monkeypatch, tmp_path, sockets, LISTEN_PID="OWN", LISTEN_FDS="2", LISTEN_FDNAMES="one:three")
    with Target() as target:
        settings = configure(tmp_path, target)
        done = subprocess.run(
            [sys.executable, "-m", "gmux", "server", "--config", settings["config"]],
            capture_output=True,
            text=True,
            timeout=60,
            **process,
        )
    port = sockets[1].getsockname()[1]
    said = f"no route is left for the socket 127.0.0.1:{port} of systemd (FileDescriptorName=three): name it after one"
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr


def test_socket_that_does_not_listen_is_an_error(monkeypatch, tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        process = launch(monkeypatch, tmp_path, [sock], LISTEN_PID="OWN", LISTEN_FDS="1")
        said = start_in_vain(process, "-l", "127.0.0.1:0")
    assert said == "gmux: the socket of descriptor 3, handed to gmux at its start, is no listening stream socket\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "OWN", "LISTEN_FDS": "many"},
        {"LISTEN_PID": "OWN", "LISTEN_FDS": "-1"},
        {"SOCKETS_OF_GMUX": '{"pid": 1, "sockets": [[3, "127.0.0.1:0", null]]}', "GUNICORN_PID": "1"},
        {"SOCKETS_OF_GMUX": '{"pid": OWN}'},
        {"SOCKETS_OF_GMUX": '{"pid": OWN, "sockets": 1}'},
        {"SOCKETS_OF_GMUX": "[1]"},
    ],
)
def test_variables_that_are_not_meant_for_it_or_make_no_sense_do_not_disturb(monkeypatch, tmp_path, sockets, variables):
    process = launch(monkeypatch, tmp_path, sockets[:1], **variables)
    with Target() as target, Server(target, process=process) as server, Client(server.address) as client:
        assert server.address != sockets[0].getsockname()
        assert client.ask(b"hello") == b"hello"


# The examples.


def directives(name: str) -> dict[str, str]:
    lines = (ROOT / "examples" / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Za-z]+=", line))


def test_example_of_a_service_has_a_command_and_a_variable_that_gmux_knows():
    service = directives("gmux.service")
    program, command, *words = shlex.split(service["ExecStart"])
    assert (program.rpartition("/")[2], command) == ("gmux", "server")
    example = str(ROOT / "examples" / "gmux.toml")
    name, _, value = service["Environment"].partition("=")
    done = subprocess.run(
        [sys.executable, "-m", "gmux", "check", *(word.replace("/etc/gmux/gmux.toml", example) for word in words)],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert name in {setting.variable for setting in SETTINGS}


def test_example_of_a_socket_is_for_a_route_of_the_example():
    example = tomllib.loads((ROOT / "examples" / "gmux.toml").read_text())
    routes = {route["name"]: route for route in example["route"]}
    listening = directives("gmux.socket")
    assert listening["ListenStream"] == str(routes[listening["FileDescriptorName"]]["listen"])
