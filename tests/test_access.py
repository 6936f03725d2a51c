"""The access log: one line for each request, whatever becomes of it, and what the line says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gevent
import iso8583
import pytest
from gevent.lock import Semaphore
from iso8583.specs import default_ascii as SPEC

from gmux.access import AccessLog, quote
from gmux.net import format_address
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client
from tests.support.framing import HTTP, ISO8583
from tests.support.service import Service, serving
from tests.support.settings import read
from tests.support.stream import Closed
from tests.support.target import (
    Target,
    answer,
    close,
    closed_port,
    hold,
    in_turn,
    never,
    padded,
    reset,
    send,
)
from tests.support.wait import wait_until

MEGABYTE = 1 << 20
FIELDS = [
    "time",
    "route",
    "client",
    "upstream",
    "request_bytes",
    "answer_bytes",
    "queued_ms",
    "held_ms",
    "total_ms",
    "outcome",
]
MODES = {"strict": {}, "by order": {"pipeline": "4"}}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class Log:
    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    @property
    def outcomes(self) -> list[str]:
        return [line["outcome"] for line in self.lines]

    def wait(self, number: int) -> list[dict[str, Any]]:
        wait_until(lambda: len(self.lines) >= number, what=f"{number} lines")
        return self.lines


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "access.log")


@contextmanager
def logged(log: Log, target: Target | tuple[str, int], **settings: str) -> Iterator[Service]:
    with serving(target, access_log=str(log.path), log_format="json", **settings) as service:
        # What is still in flight when the clients are gone must not keep the end of each test waiting.
        service.pool._discarding._seconds = 0.05
        yield service


def name_of(client: Client, number: int = 1) -> str:
    return f"#{number} {format_address(client.sock.getsockname())}"


def get(client: Client, path: bytes = b"it") -> None:
    client.send_raw(b"GET /%b HTTP/1.1\r\nHost: target\r\n\r\n" % path)


def post(client: Client, body: bytes) -> None:
    client.send_raw(b"POST /it HTTP/1.1\r\nHost: target\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


# What a line says.


@each_mode
def test_line_of_an_answered_request(log, mode):
    with Target() as target, logged(log, target, **mode) as service, Client(service.address) as client:
        client.ask(b"request")
        (where,) = (format_address(connection.sock.getpeername()) for connection in target.connections)
        there = format_address((target.server_host, target.server_port))
        name = name_of(client)
    (line,) = log.lines
    assert list(line) == FIELDS
    assert (line["route"], line["client"], line["upstream"]) == ("-", name, f"{where} <-> {there}")
    assert (line["request_bytes"], line["answer_bytes"], line["outcome"]) == (8, 8, "answered")
    assert 0 <= line["queued_ms"] <= line["total_ms"]
    assert line["held_ms"] > 0
    assert line["queued_ms"] + line["held_ms"] <= line["total_ms"] + 0.002


def test_line_as_text(tmp_path):
    path = tmp_path / "access.log"
    with Target() as target, serving(target, access_log=str(path)) as service, Client(service.address) as client:
        client.ask(b"request")
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"
    address = r"127\.0\.0\.1:\d+"
    assert re.fullmatch(
        rf'{time} route=- client="#1 {address}" upstream="{address} <-> {address}" request_bytes=8 answer_bytes=8'
        r" queued_ms=\d+\.\d{3} held_ms=\d+\.\d{3} total_ms=\d+\.\d{3} outcome=answered\n",
        path.read_text(),
    )


def test_line_has_the_name_of_its_route(log):
    access = AccessLog(read({"access_log": str(log.path), "log_format": "json"}))
    access.of_route("north").refuse(quote("#1 unix:"), "client/request")
    access.close()
    assert [line["route"] for line in log.lines] == ["north"]


def test_name_of_a_client_makes_no_line_of_its_own(log):
    access = AccessLog(read({"access_log": str(log.path)}))
    access.of_route("").refuse(quote('unix:/tmp/"\n2026 \udcff'), "client/request")
    access.close()
    (line,) = log.path.read_text().splitlines()
    assert r'client="unix:/tmp/\"\n2026 \udcff" upstream' in line


def test_time_in_the_queue_and_at_the_target_are_told_apart(log):
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, logged(log, target) as service, ExitStack() as stack:
        first, second = (stack.enter_context(Client(service.address)) for _ in range(2))
        first.send(b"first")
        wait_until(lambda: target.requests)
        second.send(b"second")
        wait_until(lambda: service.waiting)
        gevent.sleep(0.05)  # the time that is measured
        gate.release()
        first.receive()
        gate.release()
        second.receive()
    held, queued = log.lines
    assert held["held_ms"] >= 50 > held["queued_ms"]
    assert queued["queued_ms"] >= 50


def test_total_holds_the_time_of_a_client_that_takes_its_answer_slowly(log):
    with (
        Target((padded(8 * MEGABYTE),)) as target,
        logged(log, target) as service,
        Client(service.address, receive_buffer=4096) as client,
    ):
        client.send(b"request")
        wait_until(lambda: service.is_whole and target.requests)
        gevent.sleep(0.2)  # the time that is measured, and more than lines are collected for
        assert log.path.read_text() == ""
        client.receive()
        (line,) = log.wait(1)
    assert line["outcome"] == "answered"
    assert line["answer_bytes"] == 8 * MEGABYTE + 1
    assert line["total_ms"] >= line["queued_ms"] + line["held_ms"] + 200


def test_body_too_large_for_memory_is_counted(log):
    with (
        Target(framing=HTTP) as target,
        logged(log, target, spool_memory="4k") as service,
        Client(service.address, HTTP) as client,
    ):
        post(client, b"x" * MEGABYTE)
        client.receive()
    (line,) = log.lines
    assert line["outcome"] == "answered"
    assert MEGABYTE < line["request_bytes"] < MEGABYTE + 1000


def test_upstream_of_a_request_that_was_sent_again_is_the_last(log):
    behaviour = in_turn((answer,), (close,))
    with Target(behaviour, HTTP) as target, logged(log, target) as service, Client(service.address, HTTP) as client:
        for _ in range(2):
            get(client)
            client.receive()
        assert target.accepted == 2
        last = format_address(target.connections[1].sock.getpeername())
    first, second = log.lines
    assert first["upstream"] != second["upstream"]
    assert second["upstream"].startswith(last)
    assert log.outcomes == ["answered"] * 2


# The ways of ending.


def test_request_that_waits_for_too_long(log):
    with Target(never) as target, logged(log, target, queue_timeout="50ms") as service, ExitStack() as stack:
        first, second = (stack.enter_context(Client(service.address)) for _ in range(2))
        first.send(b"first")
        wait_until(lambda: target.requests)
        assert second.outcome(b"second") == "closed"
        (line,) = log.wait(1)
        first.reset()
    assert (line["outcome"], line["upstream"], line["held_ms"]) == ("pool/queue", "-", 0)
    assert line["queued_ms"] == line["total_ms"] >= 50
    assert log.outcomes == ["pool/queue", "client-gone"]


def test_request_that_finds_the_queue_full(log):
    with Target(never) as target, logged(log, target, queue_limit="0") as service, ExitStack() as stack:
        first, second = (stack.enter_context(Client(service.address)) for _ in range(2))
        first.send(b"first")
        wait_until(lambda: target.requests)
        assert second.outcome(b"second") == "closed"
        first.reset()
    assert log.outcomes == ["gmux/limit", "client-gone"]


def test_request_to_a_target_that_is_down(log):
    with logged(log, closed_port(), protocol="http") as service, Client(service.address, HTTP) as client:
        for _ in range(2):
            get(client)
            client.receive()
    assert log.outcomes == ["upstream/connect"] * 2
    assert {line["answer_bytes"] for line in log.lines} == {0}


@each_mode
def test_request_without_an_answer(log, mode):
    with (
        Target(never) as target,
        logged(log, target, timeout="50ms", **mode) as service,
        Client(service.address) as client,
    ):
        assert client.outcome(b"request") == "closed"
    (line,) = log.lines
    assert (line["outcome"], line["answer_bytes"]) == ("upstream/answer", 0)
    assert line["held_ms"] >= 50
    assert line["upstream"] != "-"


def test_answer_that_breaks_off(log):
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
    with (
        Target((send(half), reset), HTTP) as target,
        logged(log, target) as service,
        Client(service.address, HTTP) as client,
    ):
        get(client)
        with pytest.raises(Closed):
            client.receive()
    (line,) = log.lines
    assert line["outcome"] == "upstream/answer"
    assert line["answer_bytes"] > 0


def test_what_is_no_request(log):
    with Target(framing=HTTP) as target, logged(log, target) as service, Client(service.address, HTTP) as client:
        client.send_raw(b"not HTTP\r\n\r\n")
        client.receive()
        name = name_of(client)
    (line,) = log.lines
    assert line["client"] == name
    assert (line["outcome"], line["upstream"], line["total_ms"]) == ("client/request", "-", 0)


@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "in parts"])
def test_request_that_is_not_whole_in_time(log, size):
    with (
        Target(framing=HTTP) as target,
        logged(log, target, request_timeout="50ms", spool_memory="4k") as service,
        Client(service.address, HTTP) as client,
    ):
        client.send_raw(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\nx" % size)
        client.receive()
    assert log.outcomes == ["client/request"]


def test_request_past_a_limit_of_memory(log):
    with (
        Target(framing=HTTP) as target,
        logged(log, target, spool_limit="4k") as service,
        Client(service.address, HTTP) as client,
    ):
        post(client, b"x" * 200_000)
        client.receive()
    assert log.outcomes == ["gmux/limit"]


def test_client_that_leaves_before_its_request_is_whole_has_made_none(log):
    with Target() as target, logged(log, target) as service:
        with Client(service.address) as client:
            client.send_half(b"request")
        service.wait_clients(0)
    assert log.lines == []


def test_client_that_leaves_while_its_request_waits(log):
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, logged(log, target) as service, Client(service.address) as first:
        first.send(b"first")
        wait_until(lambda: target.requests)
        with Client(service.address) as second:
            second.send(b"second")
            wait_until(lambda: service.waiting)
            second.reset()
            (line,) = log.wait(1)
        gate.release()
        first.receive()
    assert (line["outcome"], line["upstream"]) == ("client-gone", "-")
    assert log.outcomes == ["client-gone", "answered"]


@each_mode
def test_client_that_leaves_while_its_request_is_in_flight(log, mode):
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, logged(log, target, **mode) as service:
        service.pool._discarding._seconds = 5
        with Client(service.address) as client:
            client.send(b"request")
            wait_until(lambda: target.requests)
            client.reset()
            (line,) = log.wait(1)
        gate.release()
        wait_until(lambda: service.is_whole)
    assert line["outcome"] == "client-gone"
    assert line["upstream"] != "-"
    assert len(log.lines) == 1


def test_client_that_leaves_before_it_has_the_whole_answer(log):
    with Target((padded(8 * MEGABYTE),)) as target, logged(log, target) as service:
        with Client(service.address, receive_buffer=4096) as client:
            client.send(b"request")
            wait_until(lambda: service.is_whole and target.requests)
            client.reset()
        service.wait_clients(0)
    assert log.outcomes == ["client-gone"]


def test_client_that_takes_nothing_of_its_answer(log):
    with (
        Target((padded(8 * MEGABYTE),)) as target,
        logged(log, target, client_write_timeout="50ms") as service,
        Client(service.address, receive_buffer=4096) as client,
    ):
        client.send(b"request")
        service.wait_clients(1)
        service.wait_clients(0)
    assert log.outcomes == ["client/answer"]


def test_client_that_is_too_slow_for_its_answer(log):
    with Target((padded(8 * MEGABYTE),)) as target, logged(log, target, spool_limit="64k") as service:
        with Client(service.address, receive_buffer=4096) as client:
            client.send(b"request")
            service.wait_clients(1)
            service.wait_clients(0)
        wait_until(lambda: service.is_whole)
    assert log.outcomes == ["client/answer"]


@each_mode
def test_end_of_a_drain_ends_what_waits_and_what_is_in_flight(log, mode):
    with Target(never) as target, logged(log, target, **mode) as service, ExitStack() as stack:
        clients = [stack.enter_context(Client(service.address)) for _ in range(6)]
        for client in clients:
            client.send(b"request")
        wait_until(lambda: service.waiting == (2 if mode else 5))
        assert not service.route.drain(0.01)
        log.wait(6)
    assert log.outcomes == ["gmux/stop"] * 6


def test_close_ends_what_is_under_way_and_only_once(log):
    with Target(never) as target, logged(log, target) as service, Client(service.address) as client:
        client.send(b"request")
        wait_until(lambda: target.requests)
        service.access.close()
        assert log.outcomes == ["gmux/stop"]
        client.reset()
    assert len(log.lines) == 1


def test_codec_that_fails(log, monkeypatch):
    with Target() as target, logged(log, target) as service, Client(service.address) as client:
        service.wait_clients(1)
        (inside,) = service.clients
        monkeypatch.setattr(type(inside._decoder), "next_event", lambda decoder: 1 / 0)
        assert client.outcome(b"request") == "closed"
    assert log.outcomes == ["gmux/codec"]


# One line each.


@pytest.mark.parametrize("mode", [{}, {"pipeline": "8"}, {"pool_size": "3", "pipeline": "2"}])
def test_each_request_of_many_clients_has_one_line(log, mode):
    def ask(number: int) -> None:
        with Client(service.address) as client:
            for _ in range(20):
                client.ask(b"x" * number)
            client.pipeline([b"x" * number] * 5)
            for _ in range(5):
                client.receive()

    with Target() as target, logged(log, target, **mode) as service:
        gevent.joinall([gevent.spawn(ask, number) for number in range(1, 21)], raise_error=True)
    assert Counter(line["request_bytes"] for line in log.lines) == {number + 1: 25 for number in range(1, 21)}
    assert set(log.outcomes) == {"answered"}


def test_each_request_by_key_has_one_line_and_greetings_and_checks_have_none(log, tmp_path):
    def message(mti: str, **fields: str) -> bytes:
        return bytes(iso8583.encode({"t": mti} | {k[1:]: v for k, v in fields.items()}, SPEC)[0])

    def approve(connection: Any, request: bytes) -> None:
        asked = iso8583.decode(request[2:], SPEC)[0]
        fields = {f"f{name}": asked[name] for name in ("7", "11", "41", "70") if name in asked}
        connection.send(ISO8583.wrap(message(f"{asked['t'][:2]}{int(asked['t'][2]) + 1}{asked['t'][3]}", **fields)))

    greeting = tmp_path / "greeting"
    greeting.write_bytes(message("0800", f7="1122153000", f11="000008", f70="001"))
    settings = {"pipeline": "4", "on_connect": str(greeting), "idle_check": "20ms"}
    with Target((approve,), ISO8583) as target, logged(log, target, **settings) as service:
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(service.address, ISO8583)) for _ in range(6)]
            for number, client in enumerate(clients):
                client.send(message("0200", f11=f"{number:06}", f41="TERM0001"))
            for client in clients:
                client.receive()
        asked = len(target.requests)
        wait_until(lambda: len(target.requests) > asked, what="an idle check")
    assert log.outcomes == ["answered"] * 6


@each_mode
def test_each_request_has_one_line_whatever_the_target_does(log, mode):
    behaviour = in_turn((answer,), (close,), (reset,), (answer, close), never, (answer,), (close,))
    ends: Counter[str] = Counter()
    with Target(behaviour) as target, logged(log, target, timeout="50ms", **mode) as service:
        for number in range(12):
            with Client(service.address) as client:
                ends[client.outcome(b"%d" % number)] += 1
    outcomes = Counter(log.outcomes)
    assert outcomes["answered"] == ends["answered"]
    assert outcomes.total() == 12


# The file.


def test_reopen_writes_to_a_new_file_of_the_name(log, tmp_path):
    with Target() as target, logged(log, target) as service, Client(service.address) as client:
        client.ask(b"first")
        log.path.rename(tmp_path / "access.log.1")
        service.access.reopen()
        client.ask(b"second")
        log.wait(1)
    assert [line["request_bytes"] for line in Log(tmp_path / "access.log.1").lines] == [6]
    assert [line["request_bytes"] for line in log.lines] == [7]


def test_file_that_cannot_be_written_disturbs_nobody_and_is_said_once(caplog):
    with Target() as target, serving(target, access_log="/dev/full") as service, Client(service.address) as client:
        for _ in range(3):
            assert client.ask(b"request") == b"request"
            service.access.reopen()  # which writes
    said = [record.getMessage() for record in caplog.records if "access log" in record.getMessage()]
    assert said == [
        "cannot write the access log /dev/full: No space left on device",
        "3 lines for the access log /dev/full are lost",  # at its end
    ]


def test_file_that_cannot_be_opened_in_a_worker_disturbs_nobody_and_is_opened_later(log, caplog):
    log.path = log.path.parent / "folder" / "access.log"
    with Target() as target, logged(log, target) as service, Client(service.address) as client:
        client.ask(b"first")
        log.path.parent.mkdir()
        service.access.reopen()
        client.ask(b"second")
        log.wait(2)
    said = [record.getMessage() for record in caplog.records if "access log" in record.getMessage()]
    assert said == [f"cannot open the access log {log.path}: No such file or directory"]
