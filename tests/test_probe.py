"""Before HTTP requests go several at a time, gmux finds out whether the target answers them; targets good and bad."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer

from gmux import prober
from gmux.folder import Folder
from gmux.sharing import SharedSlots
from tests.support.clients import Client
from tests.support.framing import HTTP, LINE
from tests.support.service import LOG, Service, serving
from tests.support.stream import Closed
from tests.support.target import Target, answer, close, in_turn, reset, send
from tests.support.wait import wait_until
from tests.test_pipeline import Script, get, warm

CLIENTS, EACH = 12, 8

#: The pause after a refusal, as the log tells it.
REFUSED = "requests go one by one; next try in 60 s"


def cut(data: bytes) -> list[bytes]:
    """Whole heads; what is left is the last one."""
    return data.split(b"\r\n\r\n")


def path(request: bytes) -> bytes:
    return request.split(b" ", 2)[1]


def page(request: bytes, version: bytes = b"1.1") -> bytes:
    """A good answer: the path, and no body for HEAD."""
    body = path(request)
    head = b"HTTP/%b 200 OK\r\nContent-Length: %d\r\nConnection: keep-alive\r\n\r\n" % (version, len(body))
    return head if request.startswith(b"HEAD ") else head + body


def is_probe(request: bytes) -> bool:
    return b"gmux (pipelining test)" in request


class Rough(StreamServer):
    """A target that is asked what to say to the requests of one read: `reply(requests)`; None: it closes then.

    `size` is that of its buffer, and `forgets` whether it throws away what a read leaves of a request.
    """

    def __init__(self, reply: Callable[[list[bytes]], Any], size: int = 65536, forgets: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), self._serve)
        self.reply = reply
        self.size = size
        self.forgets = forgets
        #: The most requests of clients that came in one read, and all paths that came.
        self.most = 0
        self.paths: list[bytes] = []

    def __enter__(self) -> Rough:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def where(self) -> tuple[str, int]:
        return "127.0.0.1", self.server_port

    def _serve(self, sock: Any, address: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        held = b""
        try:
            while data := sock.recv(self.size):
                *requests, held = cut(held + data)
                held = b"" if self.forgets and requests else held
                self.most = max(self.most, sum(not is_probe(request) for request in requests))
                self.paths += map(path, requests)
                out = self.reply(requests)
                if out is None:
                    sock.sendall(page(requests[0]))
                    return
                sock.sendall(out)
        except OSError:
            pass


def all_of(requests: list[bytes]) -> bytes:
    return b"".join(map(page, requests))


def first_of(requests: list[bytes]) -> bytes:
    return all_of(requests[:1])


def last_of(requests: list[bytes]) -> bytes:
    return all_of(requests[-1:])


def backwards(requests: list[bytes]) -> bytes:
    return all_of(requests[::-1])


def in_pairs_swapped(requests: list[bytes]) -> bytes:
    return all_of([r for at in range(0, len(requests), 2) for r in requests[at : at + 2][::-1]])


def last_twice(requests: list[bytes]) -> bytes:
    return all_of(requests + requests[-1:]) if len(requests) > 1 else all_of(requests)


def without_each_third(requests: list[bytes]) -> bytes:
    return all_of([r for at, r in enumerate(requests) if at % 3 != 2 or len(requests) <= 3])


def last_first(requests: list[bytes]) -> bytes:
    """As many answers as requests, and the order of all but one is right."""
    return all_of(requests[-1:] + requests[:-1])


def first_and_close(requests: list[bytes]) -> bytes | None:
    return all_of(requests) if len(requests) == 1 else None


def all_alike(requests: list[bytes]) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" * len(requests)


def version_1_0(requests: list[bytes]) -> bytes:
    return b"".join(page(request, b"1.0") for request in requests)


def limited(requests: list[bytes]) -> bytes:
    return all_of(requests).replace(b"Connection:", b"Keep-Alive: timeout=5, max=100\r\nConnection:")


def body_for_head(requests: list[bytes]) -> bytes:
    return b"".join(page(request.replace(b"HEAD", b"GET", 1)) for request in requests)


def slow_together(requests: list[bytes]) -> bytes:
    """What comes together is answered, and well, but long after."""
    gevent.sleep(0.5 if len(requests) > 1 else 0)
    return all_of(requests)


def joined(requests: list[bytes]) -> bytes:
    """Answers that are written over one another."""
    return all_of(requests) if len(requests) == 1 else all_of(requests)[:-3] + b"..." + all_of(requests)[-3:]


def load(service: Service, clients: int = CLIENTS, each: int = EACH) -> dict[str, int]:
    """So many clients ask each for pages of their own: how many answers were theirs, another's, or none."""
    seen = {"right": 0, "wrong": 0, "none": 0}

    def use(number: int) -> None:
        with Client(service.address, HTTP) as client:
            for n in range(each):
                name = b"c%d.r%d" % (number, n)
                client.send_raw(get(name))
                got = HTTP.read(client)
                if got[9:12] != b"200":
                    seen["none"] += 1
                else:
                    seen["right" if HTTP.payload(got) in (b"/" + name, name) else "wrong"] += 1

    gevent.joinall([gevent.spawn(use, number) for number in range(clients)], raise_error=True)
    return seen


ALL_RIGHT = {"right": CLIENTS * EACH, "wrong": 0, "none": 0}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("depth", ["2", "4", "64"])
@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (first_of, "answers came: silence for 0.3 s"),
        (last_of, "answers came: silence for 0.3 s"),
        (backwards, ""),
        (last_twice, "bytes came that nobody asked for"),
        (last_first, ""),
        (first_and_close, "1 of "),
        (slow_together, "0 of "),
        (joined, ""),
        (version_1_0, "HTTP/1.0"),
        (limited, "Keep-Alive: max"),
    ],
)
def test_target_that_fails_when_requests_come_together_is_served_one_by_one(reply, why, depth, caplog, monkeypatch):
    monkeypatch.setattr(prober, "SILENCE", 0.3)
    with Rough(reply) as target, serving(target.where, protocol="http", pipeline=depth) as service:
        assert load(service) == ALL_RIGHT
        assert target.most == 1
        assert not service.pool.licence.is_granted
    (warning,) = warnings(caplog)
    assert why in warning
    assert warning.endswith(REFUSED)


@pytest.mark.parametrize("reply", [in_pairs_swapped, without_each_third])
def test_target_that_mixes_up_or_loses_some_of_many_requests_is_served_one_by_one(reply, caplog, monkeypatch):
    monkeypatch.setattr(prober, "SILENCE", 0.3)
    with Rough(reply) as target, serving(target.where, protocol="http", pipeline="16") as service:
        assert load(service) == ALL_RIGHT
    assert warnings(caplog)[0].startswith("the target failed the test of requests that are sent together")


@pytest.mark.parametrize("size", [512, 1024, 4096])
def test_target_whose_buffer_cuts_a_request_in_two_is_served_one_by_one(size, caplog, monkeypatch):
    monkeypatch.setattr(prober, "SILENCE", 0.3)
    with Rough(all_of, size) as target, serving(target.where, protocol="http", pipeline="32") as service:
        assert load(service) == ALL_RIGHT
        assert target.most == 1
    assert warnings(caplog)[0].startswith("the target failed the test of requests that are sent together")


def test_target_that_says_the_same_to_all_is_served_one_by_one(caplog):
    with Rough(all_alike) as target, serving(target.where, protocol="http", pipeline="8") as service:
        assert load(service)["none"] == 0
        assert target.most == 1
    (warning,) = warnings(caplog)
    assert "cannot be told apart" in warning


def test_target_that_closes_behind_each_answer_is_served_and_probed_once(caplog):
    def closing(requests: list[bytes]) -> bytes:
        return all_of(requests).replace(b"keep-alive", b"close")

    with Rough(closing) as target, serving(target.where, protocol="http", pipeline="8") as service:
        assert load(service) == ALL_RIGHT
        assert [name for name in target.paths if name[:2] != b"/c"][1:] == [b"/", b"/", b"*"]
    (warning,) = warnings(caplog)
    assert warning.startswith("the target ends its connection after most answers")


def test_target_that_authenticates_the_connection_of_the_probe_is_served_and_probed_once(caplog):
    challenge = b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: NTLM TlRMTVNTUA==\r\nContent-Length: 0\r\n\r\n"

    def challenging(requests: list[bytes]) -> bytes:
        return challenge if is_probe(requests[0]) else all_of(requests)

    with Rough(challenging) as target, serving(target.where, protocol="http", pipeline="8") as service:
        assert load(service) == ALL_RIGHT
        assert [name for name in target.paths if name[:2] != b"/c"][1:] == [b"/", b"/", b"*"]
    (warning,) = warnings(caplog)
    assert warning.endswith(REFUSED)


@pytest.mark.parametrize("size", [700, 4096, 65536])
@pytest.mark.parametrize("reply", [all_of, body_for_head])
@pytest.mark.parametrize("depth", ["2", "5", "16", "64"])
def test_target_that_answers_them_all_is_given_several_at_a_time(reply, depth, size, caplog):
    """A body for HEAD ends a connection, and leaves two kinds of GET."""
    caplog.set_level(logging.INFO)
    target = Rough(reply, size, forgets=False)
    with target, serving(target.where, protocol="http", pipeline=depth) as service:
        assert load(service) == ALL_RIGHT
        assert service.pool.licence.is_granted
        assert target.most > 1
    assert warnings(caplog) == []
    assert sum("several at a time" in record.getMessage() for record in caplog.records) == 1


def test_page_with_a_counter_in_it_is_told_apart_still():
    count = 95

    def counting(requests: list[bytes]) -> bytes:
        nonlocal count
        out = b""
        for request in requests:
            count += 1
            body = path(request) if request.startswith(b"GET /c") else b"%b %d" % (path(request), count)
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            out += head if request.startswith(b"HEAD ") else head + body
        return out

    with Rough(counting) as target, serving(target.where, protocol="http", pipeline="8") as service:
        assert load(service) == ALL_RIGHT
        assert service.pool.licence.is_granted


def test_licence_is_for_the_target_and_one_probe_gets_it_for_all_connections():
    with Target(framing=HTTP) as target, serving(target, pipeline="16", pool_size="3") as service:
        assert load(service) == ALL_RIGHT
        # Two kinds alone, sixteen together, one alone.
        assert target.probed == 2 + 16 + 1


def test_nothing_is_asked_while_no_request_waits():
    with Target(framing=HTTP) as target, serving(target, pipeline="16") as service:
        assert load(service, clients=1) == {"right": EACH, "wrong": 0, "none": 0}
        assert target.probed == 0


def test_probe_is_made_as_requests_are_and_asks_for_what_is_harmless():
    with Target(framing=HTTP) as target, serving(target, pipeline="4", host="dev", set_header=["X-A: b"]) as service:
        target.passes_probes = False
        seen = []
        target.behaviour = lambda connection, request: seen.append(request) or (answer,)
        load(service)
    probes = [request for request in seen if is_probe(request)]
    assert probes
    for request in probes:
        assert request.split(b" ")[0] in (b"GET", b"HEAD", b"OPTIONS")
        for line in (b"Host: dev", b"X-A: b", b"Via: 1.1 gmux"):
            assert b"\r\n" + line + b"\r\n" in request
        assert len(request) < 1024


def test_refused_licence_is_tried_for_again_when_the_pause_is_over(monkeypatch):
    monkeypatch.setattr(prober, "SILENCE", 0.1)
    target = Rough(first_of)
    with target, serving(target.where, protocol="http", pipeline="8") as service:
        load(service)
        asked = len(target.paths)
        load(service)
        assert len(target.paths) == asked + CLIENTS * EACH
        target.reply = all_of
        service.pool.licence._next_try = 0.0
        assert load(service) == ALL_RIGHT
        assert service.pool.licence.is_granted


def test_drain_ends_a_probe_and_serves_those_who_wait():
    with Target(framing=HTTP) as target, serving(target, pipeline="8") as service, ExitStack() as stack:
        target.passes_probes = False
        script = Script(HTTP)
        script.is_free = False
        target.behaviour = script
        service.wait_ready()
        clients = [stack.enter_context(Client(service.address, HTTP)) for _ in range(2)]
        for client in clients:
            client.send_raw(get(b"x"))
        wait_until(lambda: script.count() == 1 and service.waiting == 1)
        script.release()
        wait_until(lambda: service.pool._prober.is_busy and script.count() == 1)
        service.pool.drain()
        script.is_free = True
        script.release()
        assert [HTTP.payload(HTTP.read(client)) for client in clients] == [b"x"] * 2
        assert not service.pool._prober.is_busy


def test_connection_of_a_probe_goes_to_no_other_process_while_it_runs(tmp_path):
    def share(stack: ExitStack) -> Service:
        slots = SharedSlots(Folder(tmp_path), "target", 1, "", LOG)
        return stack.enter_context(serving(target, slots, pipeline="8", pool_min="0"))

    with Target(framing=HTTP, limit=1) as target, ExitStack() as stack:
        script = Script(HTTP)
        script.is_free = False
        target.passes_probes = False
        target.behaviour = script
        one, other = share(stack), share(stack)
        clients = [stack.enter_context(Client(service.address, HTTP)) for service in (one, one, other)]
        for client in clients[:2]:
            client.send_raw(get(b"x"))
        # Two that wait for a new connection are probed for before the first of them is served.
        wait_until(lambda: one.pool._prober.is_busy and script.count() == 1)
        clients[2].send_raw(get(b"x"))
        wait_until(lambda: other.waiting == 1 and one.pool._slots.has_asks())
        one.pool.lend()
        assert (one.connected, other.connected) == (1, 0)
        script.is_free = target.passes_probes = True
        script.release(lambda connection, request: connection.send(HTTP.probe_answer(request)))
        assert [HTTP.payload(HTTP.read(client)) for client in clients] == [b"x"] * 3
        assert one.pool.licence.is_granted
        assert (target.peak, target.refused) == (1, 0)


def test_probe_is_not_in_the_access_log(tmp_path):
    log = tmp_path / "access.log"
    with Target(framing=HTTP) as target, serving(target, pipeline="8", access_log=str(log)) as service:
        load(service)
        assert target.probed
    assert len(log.read_text().splitlines()) == CLIENTS * EACH


# Doubt.


def test_target_that_begins_to_lose_requests_loses_the_licence(caplog):
    """It passes the probe. Answers that were shifted before the first sign cannot be seen; those after it are right."""

    def reply(requests: list[bytes]) -> bytes:
        return all_of(requests) if is_probe(requests[0]) else first_of(requests)

    target = Rough(reply)
    with target, serving(target.where, protocol="http", pipeline="8", timeout="300ms") as service:
        load(service, each=1)
        wait_until(lambda: not service.pool.licence.is_granted)
        assert load(service) == ALL_RIGHT
    (warning,) = warnings_of_doubt(caplog)
    assert warning.endswith(REFUSED)


def warnings_of_doubt(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in warnings(caplog) if "may be lost" in text]


class Scene(ExitStack):
    """A target that holds what it is asked, three requests in flight on its connection, and their clients."""

    def __init__(self, framing=HTTP, **settings: str) -> None:
        super().__init__()
        self.script = Script(framing)
        self.target = self.enter_context(Target(self.script, framing))
        self.service = self.enter_context(serving(self.target, pipeline="8", **settings))
        self.service.wait_ready()
        self.service.pool._discarding._seconds = 0.05
        self.clients = [self.enter_context(Client(self.service.address, framing)) for _ in range(3)]
        if framing is HTTP:
            warm(self.service, *self.clients[:2])
        self.script.log.clear()
        self.script.is_free = False
        for number, client in enumerate(self.clients):
            client.send_raw(get(b"%d" % number) if framing is HTTP else b"%d\n" % number)
            wait_until(lambda number=number: self.script.count() == number + 1)
        (self.connection,) = self.script.held
        self.script.held.clear()
        self.script.is_free = True

    def outcomes(self) -> list[bytes]:
        """The pages that the clients got, or the status where it is not 200, or nothing."""
        return [self._outcome(client) for client in self.clients]

    def _outcome(self, client: Client) -> bytes:
        try:
            got = client.framing.read(client)
        except Closed:
            return b""
        return client.framing.payload(got) if client.framing is LINE or got[9:12] == b"200" else got[9:12]

    @property
    def is_licensed(self) -> bool:
        return self.service.pool.licence.is_granted


def test_late_answer_behind_another_ends_the_connection_and_the_licence(caplog):
    with Scene(timeout="300ms") as scene:
        # The second one is lost.
        scene.connection.send(HTTP.wrap(b"0"))
        assert scene.outcomes() == [b"0", b"504", b"2"]
        assert not scene.is_licensed
        assert scene.target.accepted == 2
        assert scene.script.log == [b"0", b"1", b"2", b"2"]
    assert len(warnings_of_doubt(caplog)) == 1


def test_silence_after_several_requests_ends_the_licence():
    with Scene(timeout="300ms") as scene:
        assert scene.outcomes() == [b"504", b"1", b"2"]
        assert not scene.is_licensed


@pytest.mark.parametrize("end", [close, reset])
def test_target_that_closes_unannounced_behind_an_answer_ends_the_licence(end):
    with Scene() as scene:
        scene.connection.send(HTTP.wrap(b"0"))
        end(scene.connection, b"")
        # A reset may destroy the answer on its way.
        assert scene.outcomes() == [b"0", b"1", b"2"]
        assert not scene.is_licensed or scene.script.log.count(b"0") == 2


def test_malformed_answer_and_bytes_behind_the_last_one_end_the_licence():
    with Scene() as scene:
        scene.connection.send(HTTP.wrap(b"0") + b"not HTTP\r\n\r\n")
        assert scene.outcomes() == [b"0", b"502", b"2"]
        assert not scene.is_licensed
    with Scene() as scene:
        scene.connection.send(HTTP.wrap(b"0") + HTTP.wrap(b"1") + HTTP.wrap(b"2") + HTTP.wrap(b"2"))
        assert scene.outcomes() == [b"0", b"1", b"2"]
        assert not scene.is_licensed


def test_announced_close_and_a_close_before_any_answer_are_no_doubt():
    with Scene() as scene:
        scene.connection.send(HTTP.wrap(b"0").replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))
        assert scene.outcomes() == [b"0", b"1", b"2"]
        assert scene.is_licensed
    with Scene() as scene:
        scene.connection.close()
        assert scene.outcomes() == [b"0", b"1", b"2"]
        assert scene.is_licensed


def test_faults_of_requests_that_are_alone_are_no_doubt():
    with (
        Target(framing=HTTP) as target,
        serving(target, pipeline="8", timeout="100ms") as service,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(Client(service.address, HTTP)) for _ in range(2)]
        warm(service, *clients)
        for steps in [(), (send(b"not HTTP\r\n\r\n"),), (answer, answer), (close,)]:
            target.behaviour = in_turn(steps)
            clients[0].send_raw(get(b"x"))
            HTTP.read(clients[0])
            wait_until(lambda: service.is_ready)
        assert service.pool.licence.is_granted


def test_bytes_on_a_connection_that_was_idle_for_long_are_no_doubt(monkeypatch):
    monkeypatch.setattr("gmux.by_order.SURPLUS_TIME", 0.05)
    with Scene() as scene:
        for name in (b"0", b"1", b"2"):
            scene.connection.send(HTTP.wrap(name))
        assert scene.outcomes() == [b"0", b"1", b"2"]
        gevent.sleep(0.1)
        scene.connection.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        scene.connection.close()
        wait_until(lambda: scene.target.accepted == 2)
        assert scene.is_licensed


def test_lines_go_several_at_a_time_from_the_start_and_one_by_one_after_a_doubt(caplog):
    """No line is known to be harmless, and no answer shows its request: `--pipeline` is the operator's word for it."""
    caplog.set_level(logging.INFO)
    with Scene(LINE, timeout="300ms") as scene:
        scene.connection.send(b"0\n")
        assert scene.outcomes() == [b"0", b"", b""]
        assert not scene.is_licensed
        assert len(warnings_of_doubt(caplog)) == 1
        with Client(scene.service.address) as one, Client(scene.service.address) as other:
            scene.script.is_free = False
            one.send(b"3")
            other.send(b"4")
            wait_until(lambda: scene.script.count() == 1 and scene.service.waiting == 1)
            scene.service.pool.licence._next_try = 0.0
            scene.script.is_free = True
            scene.script.release()
            assert (one.receive(), other.receive()) == (b"3", b"4")
            assert scene.is_licensed
    assert any("several at a time again" in record.getMessage() for record in caplog.records)
