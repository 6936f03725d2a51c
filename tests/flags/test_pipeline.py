"""--pipeline and what goes with it: how many requests are in flight, on which connection, and whose an answer is."""

from __future__ import annotations

import json
from contextlib import ExitStack

import iso8583
import pytest
from gevent.lock import Semaphore
from iso8583.specs import default, default_ascii

from tests.support.clients import Client
from tests.support.framing import HTTP, ISO8583, LINE
from tests.support.service import Server
from tests.support.stream import Closed
from tests.support.target import Target, answer, hold
from tests.support.wait import wait_until
from tests.test_probe import Rough, first_of


def message(stan: int, spec=default_ascii, **fields: str) -> bytes:
    named = {name.lstrip("f"): value for name, value in fields.items()}
    return bytes(iso8583.encode({"t": "0200", "11": f"{stan:06}"} | named, spec)[0])


def answer_to(request: bytes, spec=default_ascii) -> bytes:
    return bytes(iso8583.encode(iso8583.decode(request, spec)[0] | {"t": "0210", "39": "00"}, spec)[0])


class Collector:
    """A target that keeps its requests, and answers when the test says."""

    def __init__(self) -> None:
        self.got: list = []

    def __call__(self, connection, request):
        self.got.append((connection, request))
        return ()

    def answer(self, at: int, spec=default_ascii) -> None:
        connection, request = self.got[at]
        connection.send(ISO8583.wrap(answer_to(request[2:], spec)))


class Scene(ExitStack):
    def __init__(self, *words: str, framing=ISO8583) -> None:
        super().__init__()
        self.framing = framing
        self.host = Collector()
        self.target = self.enter_context(Target(self.host, framing))
        self.server = self.enter_context(Server(self.target, *words))

    def ask(self, *requests: bytes) -> list[Client]:
        clients = [self.enter_context(Client(self.server.address, self.framing)) for _ in requests]
        for client, request in zip(clients, requests, strict=True):
            client.send(request)
        return clients


def test_pipeline_two_has_two_requests_in_flight_and_no_third():
    with Scene("--pipeline", "2", framing=LINE) as scene:
        clients = scene.ask(b"a", b"b", b"c")
        wait_until(lambda: len(scene.host.got) == 2)
        for _ in range(3):
            wait_until(lambda: scene.host.got)
            connection, request = scene.host.got.pop(0)
            connection.send(request)
        assert sorted(client.receive() for client in clients) == [b"a", b"b", b"c"]
        assert scene.target.accepted == 1


def test_pipeline_of_http_is_one_by_one_for_a_target_that_loses_requests_and_the_log_says_why():
    with Rough(first_of) as target, Server(target.where, "--protocol=http", "--pipeline", "4") as server:
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(server.address, HTTP)) for _ in range(6)]
            for number, client in enumerate(clients):
                client.send_raw(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
            assert [client.receive() for client in clients] == [b"/%d" % number for number in range(6)]
        assert "(1 of 4 answers came: silence for 2 s): requests go one by one" in server.said("sent together")
        assert target.most == 1


def test_prefer_pipeline_opens_no_second_connection_while_the_first_has_room():
    gate = Semaphore(0)
    words = ("--pipeline", "4", "--pool-size", "2", "--prefer-pipeline")
    with Target((hold(gate), answer)) as target, Server(target, *words) as server, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(4)]
        for client in clients:
            client.send(b"x")
        wait_until(lambda: target.requests)
        for _ in clients:
            gate.release()
        assert [client.receive() for client in clients] == [b"x"] * 4
        assert target.accepted == 1


def test_correlation_key_takes_answers_in_any_order_and_order_takes_them_as_they_come():
    with Scene("--correlation", "key", "--pipeline", "2") as scene:
        clients = scene.ask(message(1), message(2))
        wait_until(lambda: len(scene.host.got) == 2)
        scene.host.answer(1)
        scene.host.answer(0)
        assert {iso8583.decode(client.receive(), default_ascii)[0]["11"] for client in clients} == {"000001", "000002"}
    with Scene("--correlation", "order", "--pipeline", "2") as scene:
        clients = scene.ask(b"not", b"read")
        wait_until(lambda: len(scene.host.got) == 2)
        for connection, request in scene.host.got:
            connection.send(request)
        assert [client.receive() for client in clients] == [b"not", b"read"]


@pytest.mark.parametrize("kind", ["binary", "file"])
def test_spec_says_where_the_key_fields_are(kind, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(default))
    spec = "binary" if kind == "binary" else str(path)
    with Scene("--pipeline", "2", "--spec", spec) as scene:
        (client,) = scene.ask(message(1, default))
        wait_until(lambda: scene.host.got)
        scene.host.answer(0, default)
        assert iso8583.decode(client.receive(), default)[0]["11"] == "000001"
        (wrong,) = scene.ask(message(1, default_ascii)[:20])
        with pytest.raises(Closed):
            wrong.receive()


def test_key_fields_tell_requests_apart_that_have_the_same_number():
    with Scene("--pipeline", "2", "--key-fields", "37", "--key-fields", "0800:11") as scene:
        clients = scene.ask(message(1, f37="000000000001"), message(1, f37="000000000002"))
        wait_until(lambda: len(scene.host.got) == 2)
        scene.host.answer(1)
        scene.host.answer(0)
        numbers = [iso8583.decode(client.receive(), default_ascii)[0]["37"] for client in clients]
        assert numbers == ["000000000001", "000000000002"]


def test_late_window_reserves_the_key_of_a_request_without_answer():
    words = ("--pipeline", "2", "--timeout", "100ms", "--queue-timeout", "300ms")
    for window, is_sent_again in (("60s", False), ("100ms", True)):
        with Scene(*words, "--late-window", window) as scene:
            for _ in range(2):
                (client,) = scene.ask(message(1))
                with pytest.raises(Closed):
                    client.receive()
            assert len(scene.host.got) == (2 if is_sent_again else 1)
