"""The flags of the log and of the access log: where they go, and what is in them."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import ExitStack
from time import monotonic

import pytest
from gevent import subprocess

from tests.flags.support import ask_http
from tests.support.clients import Client
from tests.support.service import ROOT, Server
from tests.support.target import Target, closed_port, never
from tests.support.wait import wait_until


def failed_start(*words: str) -> str:
    """What `gmux server` says that ends at once, with 1."""
    command = [sys.executable, "-m", "gmux", "server", "--listen=127.0.0.1:0", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    return str(done.stderr)


# The log.


def test_log_file_has_the_log_and_standard_error_nothing(tmp_path):
    log = tmp_path / "gmux.log"
    with Target() as target, Server(target, log_file=str(log)) as server, Client(server.address) as client:
        client.ask(b"request")
    lines = log.read_text().splitlines()
    assert lines[0].startswith("INFO[")
    assert "listening on" in lines[0]
    assert any("new target connection" in line for line in lines)  # the worker's
    assert server.log == []


def test_log_file_that_cannot_be_opened_ends_the_start_with_one_line(tmp_path):
    name = tmp_path / "no" / "gmux.log"
    assert failed_start(f"--log-file={name}") == f"gmux: cannot open the log file {name}: No such file or directory\n"


def test_log_file_and_access_log_moved_away_are_made_anew_by_usr1(tmp_path):
    names = [tmp_path / "gmux.log", tmp_path / "access.log"]
    settings = {"log_file": str(names[0]), "access_log": str(names[1])}
    with Target() as target, Server(target, **settings) as server, Client(server.address) as client:
        client.ask(b"first")
        for name in names:
            name.rename(f"{name}.1")
        server.signal(signal.SIGUSR1)
        # The master makes them, then the worker follows; nothing tells when it has.
        wait_until(lambda: all(name.exists() for name in names))
        wait_until(lambda: client.ask(b"again") and names[1].read_text())
        Client(server.address).reset()
        wait_until(lambda: "closed: " in names[0].read_text())


@pytest.mark.parametrize(("level", "lines"), [("warning", 2), ("error", 0)])
def test_log_level_leaves_out_what_is_below(level, lines):
    with Server(closed_port(), protocol="http", retry_delay="25s", log_level=level) as server:
        assert ask_http(server)[0] == 502
    assert len(server.log) == lines  # of the target, and of the client that was refused


def test_log_level_debug_shows_more_and_dumps_no_message():
    with Target() as target, Server(target, log_level="debug") as server, Client(server.address) as client:
        client.ask(b"request")
        client.reset()
        wait_until(lambda: server.said("Connection reset by peer"))
    assert not server.said("00000000")


# The access log.


def test_access_log_has_a_line_for_each_request(tmp_path):
    log = tmp_path / "access.log"
    with Target() as target, Server(target, access_log=str(log)) as server, Client(server.address) as client:
        for _ in range(3):
            client.ask(b"request")
        # It is there while the service runs.
        wait_until(lambda: len(log.read_text().splitlines()) == 3)
        client.ask(b"last")
    lines = log.read_text().splitlines()
    assert len(lines) == 4
    assert all(line.endswith(" outcome=answered") for line in lines)
    assert not server.said("outcome=")


def test_access_log_dash_is_standard_output(tmp_path):
    out = tmp_path / "out"
    with (
        Target() as target,
        out.open("wb") as file,
        Server(target, access_log="-", log_format="json", process={"stdout": file}) as server,
        Client(server.address) as client,
    ):
        client.ask(b"request")
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["outcome"], line["request_bytes"]) == ("answered", 8)
    assert not server.said("outcome")


def test_access_log_that_cannot_be_opened_ends_the_start_with_one_line(tmp_path):
    name = tmp_path / "no" / "access.log"
    text = f"gmux: cannot open the access log {name}: No such file or directory\n"
    assert failed_start(f"--access-log={name}") == text


@pytest.mark.parametrize("name", ["TERM", "INT", "QUIT"])
def test_access_log_tells_of_requests_that_the_end_cuts_off(tmp_path, name):
    log = tmp_path / "access.log"
    settings = {"access_log": str(log), "log_format": "json", "graceful_timeout": "100ms", "pipeline": "3"}
    with Target(never) as target, Server(target, **settings) as server, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(3)]
        for client in clients:
            client.send(b"request")
        wait_until(lambda: len(target.requests) == 3)
        server.signal(getattr(signal, f"SIG{name}"))
        assert server.wait() == 0
    assert [json.loads(line)["outcome"] for line in log.read_text().splitlines()] == ["gmux/stop"] * 3


# A reader that is slow.


@pytest.mark.parametrize("words", [(), ("-v",)], ids=["usual", "verbose"])
def test_reader_of_the_log_that_has_stopped_makes_no_client_wait(words):
    with Target() as target, Server(target, *words) as server, Client(server.address) as client:
        server._reading.kill()
        longest = 0.0
        for _ in range(1000):
            Client(server.address).reset()  # two lines
            begin = monotonic()
            client.ask(b"." * 100)
            longest = max(longest, monotonic() - begin)
        assert longest < 0.4, "it is half a second when the loop waits for the reader"


def test_reader_of_the_log_that_comes_at_the_end_gets_every_line():
    with Target() as target, Server(target) as server:
        server._reading.kill()
        for _ in range(1000):
            with Client(server.address) as client:
                client.ask(b"x")
        server.signal(signal.SIGTERM)
        lines = server._process.stderr.read().splitlines()
        assert sum(b"closed: " in line for line in lines) == 1000
        assert server._process.wait() == 0
