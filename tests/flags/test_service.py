"""The flags of the service: its end, its processor time and its log."""

from __future__ import annotations

import json
import re
import signal
from contextlib import ExitStack
from time import monotonic

import gevent
import iso8583
import pytest
from gevent.lock import Semaphore
from iso8583.specs import default_ascii

from gmux import spinner
from gmux.net import format_address
from tests.flags.support import ask_http, cpu_seconds
from tests.support.clients import Client
from tests.support.framing import HTTP, ISO8583
from tests.support.service import Server, serving
from tests.support.target import Target, answer, closed_port, hold, never, padded, send
from tests.support.wait import wait_until

CARD = "4000001234567899"


# The end.


def test_graceful_timeout_over_cuts_off_requests_under_way():
    with Target(never) as target, Server(target, graceful_timeout="300ms") as server:
        with Client(server.address) as client:
            client.send(b"request")
            wait_until(lambda: target.requests)
            begin = monotonic()
            assert server.stop() == 0
            # The default is 30 s.
            assert 0.29 <= monotonic() - begin < 15
            assert client.outcome(b"") == "closed"
        assert server.said("requests were cut off after 0.3 s of draining")


def test_graceful_timeout_not_over_lets_requests_under_way_end():
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, Server(target, graceful_timeout="20s") as server:
        with Client(server.address) as client, Client(server.address) as idle:
            client.send(b"request")
            wait_until(lambda: target.requests)
            server.signal(signal.SIGTERM)
            idle.receive_end()  # so draining has begun
            gate.release()
            assert client.receive() == b"request"
        assert server.stop() == 0
        assert not server.said("cut off")


# Disk.


def test_disk_limit_is_for_all_clients_together_and_ends_a_slow_one_past_it():
    """Two answers that are not taken, of which only one fits."""
    much = 12 << 20
    settings = {"spool_memory": "64k", "disk_limit": "16M"}
    with Target((padded(much),)) as target, Server(target, **settings) as server, ExitStack() as stack:
        slow = [stack.enter_context(Client(server.address, receive_buffer=4096)) for _ in range(2)]
        for client in slow:
            client.send(b"much")
        wait_until(lambda: server.said("temporary files may hold 16777216 bytes (--disk-limit)"))
        assert len([line for line in server.log if "--disk-limit" in line]) == 1


# Memory.


def test_memory_limit_is_for_all_routes_together(tmp_path):
    """A request on one route, of which there is no room for another on the second."""
    part = b"." * 400 * 1024
    with Target() as target, ExitStack() as stack:
        file = tmp_path / "two.toml"
        where = [f"unix:{tmp_path}/{name}" for name in ("one", "two")]
        file.write_text(
            "".join(
                f'[[route]]\nname = "{name}"\nlisten = "{listen}"\ntarget = "{format_address(target.where)}"\n'
                for name, listen in zip(("one", "two"), where, strict=True)
            )
        )
        server = stack.enter_context(Server(target, config=str(file), memory_limit="1M", listen="", target=""))
        first, second = (stack.enter_context(Client(listen.removeprefix("unix:"))) for listen in where)
        first.send_raw(part)
        assert first.sock  # it stays
        second.send_raw(part)
        wait_until(lambda: server.said("clients hold 1048576 bytes of memory (--memory-limit)"))


def test_memory_limit_too_small_for_all_clients_is_said_at_start():
    with Target() as target, Server(target, memory_limit="1M", max_clients="100") as server:
        said = "--memory-limit: 1048576 bytes are enough for 64 clients in each worker, and --max-clients allows 100"
        assert server.said(said)
    with Target() as target, Server(target, memory_limit="1M", max_clients="64") as server:
        assert not server.said("--memory-limit")


# Processor time.


def test_spin_one_second_is_seen_as_processor_time_after_a_request():
    with Target() as target, Server(target, spin="1s") as server, Client(server.address) as client:
        client.ask(b"first")
        (worker,) = server.workers()
        before = cpu_seconds(worker)

        def has_polled() -> bool:
            # Each is another second of polling, of which a busy machine may give little; by itself it costs nothing.
            client.ask(b"again")
            gevent.sleep(0.2)
            return cpu_seconds(worker) - before >= 0.2

        wait_until(has_polled)


@pytest.mark.parametrize(("spin", "polls"), [("0", False), ("50us", True)])
def test_spin_looks_at_the_clock_only_for_a_time_after_a_request(monkeypatch, spin, polls):
    """In process: 50 us cannot be seen from outside. Each turn of a loop that polls looks at the clock."""
    looks = 0

    def counting() -> float:
        nonlocal looks
        looks += 1
        return monotonic()

    monkeypatch.setattr(spinner, "monotonic", counting)
    with Target() as target, serving(target, spin=spin) as service, Client(service.address) as client:
        service.wait_ready()
        client.ask(b"request")
        assert bool(looks) is polls

        def is_still() -> bool:
            before = looks
            gevent.sleep(0.05)
            return looks == before

        # Not at once: a busy machine gives the loop its last turn of polling later than its timers.
        wait_until(is_still)


def test_spin_or_not_idle_service_uses_no_processor_time():
    with ExitStack() as stack:
        pids = []
        for spin in ("0", "50us"):
            # One target each: two services share the connections to one.
            target = stack.enter_context(Target())
            server = stack.enter_context(Server(target, spin=spin))
            with Client(server.address) as client:
                client.ask(b"request")
            pids += [server.pid, *server.workers()]
        assert len(pids) == 4
        before = list(map(cpu_seconds, pids))
        gevent.sleep(1)
        # A loop that polls would use all of it, or its share of a busy machine.
        assert all(cpu_seconds(pid) - was <= 0.1 for pid, was in zip(pids, before, strict=True))


# The log.


def test_log_format_json_is_an_object_a_line():
    with Target(framing=HTTP) as target:
        with Server(target, log_format="json") as server, Client(server.address, HTTP) as client:
            client.send_raw(b"not HTTP\r\n\r\n")
            client.receive()
        lines = [json.loads(line) for line in server.log]
    assert {(line["level"], line["message"].partition(" on ")[0]) for line in lines} >= {("info", "listening")}
    assert [line["level"] for line in lines].count("warning") == 1
    assert {frozenset(line) for line in lines} == {frozenset(("time", "level", "message"))}


def test_quiet_logs_warnings_alone():
    with Server(closed_port(), "-q", protocol="http", retry_delay="25s") as server:
        assert ask_http(server)[0] == 502
    assert len(server.log) == 2  # of the target, and of the client that was refused
    assert {line[:5] for line in server.log} == {"WARN["}


def test_verbose_dumps_messages_with_direction_and_connection():
    with Target(framing=HTTP) as target:
        with Server(target, "-v") as server, Client(server.address, HTTP) as client:
            name = format_address(client.sock.getsockname())
            client.send_raw(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.receive() == b"hello"
            (where,) = (format_address(connection.sock.getpeername()) for connection in target.connections)
        there = format_address((target.server_host, target.server_port))
    # Its end brings the rest of the log.
    log = "\n".join(server.log)
    for line in (
        rf"DEBU\[\S+\] #1 {name} -> {there} \({where} <-> {there}\) \d+ bytes",
        rf"DEBU\[\S+\] {there} -> #1 {name} \({where} <-> {there}\) \d+ bytes",
        r"00000000  47 45 54 20 2f 68 65 6c 6c 6f 20 48 54 54 50 2f  \|GET /hello HTTP/\|",
    ):
        assert re.search(rf"^{line}$", log, re.MULTILINE), line


def dumped(*words: str) -> str:
    """The text column of what is logged when a message with a card number passes."""
    request, reply = (
        bytes(iso8583.encode({"t": mti, "2": CARD, "11": "654321"}, default_ascii)[0]) for mti in ("0200", "0210")
    )
    with ExitStack() as stack:
        target = stack.enter_context(Target((send(ISO8583.wrap(reply)),), ISO8583))
        server = stack.enter_context(Server(target, *words))
        client = stack.enter_context(Client(server.address, ISO8583))
        assert client.ask(request) == reply
    return "".join(line.partition("|")[2].rstrip("|") for line in server.log)


def test_unsafe_dump_with_verbose_shows_the_card_number():
    jobs = [gevent.spawn(dumped, *words) for words in (["-v"], ["-v", "--unsafe-dump"], ["--unsafe-dump"])]
    masked, shown, nothing = (job.get() for job in jobs)
    assert masked.count("654321") == shown.count("654321") == 2  # the dumps of request and answer
    assert masked.count("*" * len(CARD)) == shown.count(CARD) == 2
    assert CARD not in masked
    assert nothing == ""
