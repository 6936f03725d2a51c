"""A message of the target is delivered only where it can be the answer: by its type, and its number, in every mode."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack

import iso8583
import pytest
from iso8583.specs import default_ascii

from tests.codecs.test_iso8583_identity import SPECS as WRITINGS
from tests.codecs.test_iso8583_identity import encode
from tests.support.clients import Client
from tests.support.framing import ISO8583, LINE, MPU
from tests.support.service import serving
from tests.support.stream import Closed
from tests.support.target import Target
from tests.support.wait import wait_until

MODES = {
    "strict": {},
    "strict, by its spec": {"spec": "ascii"},
    "by order": {"pipeline": "4", "correlation": "order"},
    "by order, by its spec": {"pipeline": "4", "correlation": "order", "spec": "ascii"},
    "by key": {"pipeline": "4"},
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def message(mti: str, number: int, spec=default_ascii, **fields: str) -> bytes:
    return encode(spec, mti, f11=f"{number:06}", **fields)


def read(data: bytes, spec=default_ascii) -> tuple[str, str, str]:
    """Type, number, and field 48, which names whose answer it is."""
    fields = iso8583.decode(data, spec)[0]
    return fields["t"], fields["11"], fields.get("48", "")


class Scene(ExitStack):
    """A host that says only what the test says."""

    def __init__(self, framing=ISO8583, writing=default_ascii, **settings: str | list[str]) -> None:
        super().__init__()
        self.framing, self.writing = framing, writing
        self.target = self.enter_context(Target((), framing))
        self.service = self.enter_context(serving(self.target, **{"timeout": "5s"} | settings))
        self.service.wait_ready()
        self.service.pool._discarding._seconds = 0.05

    def ask(self, *numbers: int, mti: str = "0200") -> list[Client]:
        """A request of each number, each by a client of its own, which is at the target then."""
        clients = []
        for number in numbers:
            before = len(self.target.requests)
            client = self.enter_context(Client(self.service.address, self.framing))
            client.send(message(mti, number, self.writing, f48=f"of {number}"))
            wait_until(lambda before=before: len(self.target.requests) > before)
            clients.append(client)
        return clients

    def say(self, *messages: bytes) -> None:
        self.target.connections[-1].send(b"".join(map(self.framing.wrap, messages)))

    def answer(self, number: int, mti: str = "0210") -> bytes:
        return message(mti, number, self.writing, f48=f"of {number}")

    def own(self, mti: str = "0800", number: int = 77) -> bytes:
        return message(mti, number, self.writing)


@each_mode
@pytest.mark.parametrize("own", ["0800", "0820", "0100", "0200", "0220", "0400", "0620", "0240"])
def test_message_of_the_target_while_a_request_is_in_flight_is_not_its_answer(own, mode):
    """Hosts do so every minute. The first terminal got it, and the next one the answer of the first."""
    with Scene(**mode) as scene:
        for number in (1, 2):
            [client] = scene.ask(number)
            scene.say(scene.own(own, number), scene.answer(number))
            assert read(client.receive()) == ("0210", f"{number:06}", f"of {number}")
        assert scene.target.accepted == 1


@pytest.mark.parametrize("framing", [ISO8583, MPU], ids=repr)
@pytest.mark.parametrize("spec", WRITINGS.values(), ids=WRITINGS)
def test_message_of_the_target_is_known_in_each_writing(spec, framing):
    with Scene(framing, spec) as scene:
        client = scene.enter_context(Client(scene.service.address, framing))
        client.send(message("0200", 1, spec))
        wait_until(lambda: scene.target.requests)
        scene.say(message("0800", 1, spec), message("0210", 1, spec))
        assert client.receive() == message("0210", 1, spec)


@pytest.mark.parametrize("header", [b"\x60\0\x01\0\0", b"ISO025000077"], ids=["TPDU", "BASE24"])
def test_message_of_the_target_is_known_behind_a_header(header):
    with Scene() as scene:
        client = scene.enter_context(Client(scene.service.address, ISO8583))
        client.send(header + message("0200", 1))
        wait_until(lambda: scene.target.requests)
        scene.say(header + message("0800", 1), header + message("0210", 1))
        assert client.receive() == header + message("0210", 1)


@each_mode
def test_message_of_the_target_with_close_ends_the_connection_and_its_requests(mode):
    with Scene(unsolicited="close", **mode) as scene:
        [client] = scene.ask(1)
        scene.say(scene.own())
        client.receive_end()
        wait_until(lambda: scene.target.accepted == 2)
        assert scene.target.peak == 1


@each_mode
def test_message_of_the_target_with_broadcast_goes_to_all_and_is_no_answer(mode):
    with Scene(unsolicited="broadcast", **mode) as scene:
        [client] = scene.ask(1)
        other = scene.enter_context(Client(scene.service.address, ISO8583))
        scene.service.wait_clients(2)
        scene.say(scene.own("0620"), scene.answer(1))
        assert {client.receive(), client.receive()} == {scene.own("0620"), scene.answer(1)}
        assert other.receive() == scene.own("0620")


@each_mode
def test_message_of_the_target_on_an_idle_connection_is_dropped(mode):
    with Scene(**mode) as scene:
        scene.say(scene.own())
        [client] = scene.ask(1)
        scene.say(scene.answer(1))
        assert read(client.receive())[0] == "0210"
        assert scene.target.accepted == 1


@each_mode
def test_message_of_the_target_is_logged_with_type_and_number_and_nothing_secret(mode, caplog):
    with caplog.at_level(logging.WARNING), Scene(**mode) as scene:
        [client] = scene.ask(1)
        scene.say(message("0200", 77, f2="4111111111111111", f41="TERM0001"), scene.answer(1))
        client.receive()
    [line] = [record.message for record in caplog.records if "nobody asked for" in record.message]
    assert "0200, 11=000077" in line
    assert "4111111111111111" not in caplog.text


def test_by_key_a_message_of_the_target_needs_no_field_that_the_spec_knows():
    """Its key is of no interest, so that it cannot be read is no doubt about those that are in flight."""
    unknown = bytes(iso8583.encode({"t": "0800", "65": "1", "11": "000001"}, default_ascii)[0])[:-8]
    with Scene(**MODES["by key"]) as scene:
        [client] = scene.ask(1)
        scene.say(unknown, scene.answer(1))
        assert read(client.receive())[0] == "0210"
        assert scene.target.accepted == 1


# Answers to others.


@pytest.mark.parametrize("mode", [MODES["strict"], MODES["strict, by its spec"], MODES["by key"]])
def test_second_answer_that_comes_late_is_dropped(mode):
    """No order can tell it from the answer that is due; its number can."""
    with Scene(**mode) as scene:
        for number in range(1, 6):
            [client] = scene.ask(number)
            scene.say(scene.answer(number - 1), scene.answer(number))
            assert read(client.receive()) == ("0210", f"{number:06}", f"of {number}")
        assert scene.target.accepted == 1


@each_mode
def test_answer_that_nobody_waits_for_is_dropped_on_an_idle_connection_and_never_broadcast(mode):
    with Scene(unsolicited="broadcast", **mode) as scene:
        other = scene.enter_context(Client(scene.service.address, ISO8583))
        scene.service.wait_clients(1)
        scene.say(scene.answer(9))
        [client] = scene.ask(1)
        scene.say(scene.answer(8), scene.answer(1))
        assert read(client.receive())[1] == "000001"
        other.send(message("0200", 2))
        wait_until(lambda: len(scene.target.requests) == 2)
        scene.say(scene.answer(2))
        assert read(other.receive())[1] == "000002"


@pytest.mark.parametrize("kind", ["0230", "0410", "0810"])
def test_answer_of_another_kind_is_no_answer(kind):
    with Scene() as scene:
        [client] = scene.ask(1)
        scene.say(scene.answer(1, kind), scene.answer(1))
        assert read(client.receive())[0] == "0210"


@pytest.mark.parametrize("policy", ["close", "drop"])
def test_by_order_an_answer_out_of_turn_ends_what_is_in_flight(policy):
    """One is missing, or the target does not answer in order: whose the others are cannot be told any more."""
    with Scene(**MODES["by order"], unsolicited=policy) as scene:
        clients = scene.ask(1, 2, 3)
        scene.say(scene.answer(1), scene.answer(3))
        assert read(clients[0].receive())[1] == "000001"
        for client in clients[1:]:
            client.receive_end()
        wait_until(lambda: scene.target.accepted == 2)


def test_by_order_the_fields_that_answers_have_in_common_can_be_others():
    """For a host that does not give the number back."""
    with Scene(key_fields=["41"]) as scene:
        [client] = scene.ask(1)
        scene.say(message("0210", 2, f41="TERM0001"))
        assert read(client.receive())[1] == "000002"
        client.send(message("0200", 3, f41="TERM0001"))
        wait_until(lambda: len(scene.target.requests) == 2)
        scene.say(message("0210", 4, f41="TERM0002"), message("0210", 4, f41="TERM0001", f48="mine"))
        assert read(client.receive())[2] == "mine"


@pytest.mark.parametrize("mode", [MODES["strict"], MODES["by order"]])
def test_by_order_a_second_answer_is_told_from_that_to_the_same_number_of_another_terminal(mode):
    """Each terminal counts for itself: with field 11 alone the next one got it, and its own answer was dropped."""
    with Scene(key_fields=["11,41"], **mode) as scene:
        first, second = (scene.enter_context(Client(scene.service.address, ISO8583)) for _ in range(2))
        for number, client, terminal in ((1, first, "TERM0001"), (2, second, "TERM0002")):
            client.send(message("0200", 7, f41=terminal))
            wait_until(lambda number=number: len(scene.target.requests) == number)
            scene.say(message("0210", 7, f41="TERM0001", f48="first"))
            if client is first:
                assert read(client.receive())[2] == "first"
        scene.say(message("0210", 7, f41="TERM0002", f48="second"))
        assert read(second.receive())[2] == "second"
        assert scene.target.accepted == 1


@each_mode
def test_answer_of_a_client_goes_nowhere_and_takes_no_turn(mode):
    with Scene(**mode) as scene:
        client = scene.enter_context(Client(scene.service.address, ISO8583))
        client.send(message("0810", 77))
        client.send(message("0200", 1))
        wait_until(lambda: scene.target.requests)
        assert scene.target.requests == [message("0200", 1)]
        scene.say(scene.answer(1))
        assert read(client.receive())[1] == "000001"


@each_mode
def test_greeting_is_not_answered_by_a_message_of_the_target(mode, tmp_path):
    file = tmp_path / "sign-on"
    file.write_bytes(message("0800", 5, f70="001"))

    def behaviour(connection, request):
        if request == ISO8583.wrap(file.read_bytes()):
            connection.send(ISO8583.wrap(message("0800", 77)))
        return ()

    settings = {"on_connect": str(file), "timeout": "50ms", "retry_delay": "10s"} | mode
    with Target(behaviour, ISO8583) as target, serving(target, **settings) as service:
        wait_until(lambda: service.pool._retry_timer is not None, what="a failed attempt to connect")
        with Client(service.address, ISO8583) as client:
            client.send(message("0200", 1))
            with pytest.raises(Closed):
                client.receive()
        assert target.accepted == 1


# Where no type can be read.


def test_message_without_a_type_passes_as_the_answer():
    """Of another protocol behind the same header, or with a header before its type that gmux does not know."""
    with Scene() as scene:
        client = scene.enter_context(Client(scene.service.address, ISO8583))
        for payload in (b"A4M04000" + message("0200", 1), b"hello"):
            client.send(payload)
            wait_until(lambda payload=payload: payload in scene.target.requests)
            scene.say(payload)
            assert client.receive() == payload


def test_message_without_a_type_on_an_idle_connection_ends_it():
    with Scene() as scene:
        scene.say(b"hello")
        wait_until(lambda: scene.target.accepted == 2)


def test_header_before_the_type_is_what_a_spec_tells(tmp_path):
    spec = {name: dict(field) for name, field in default_ascii.items()}
    spec["h"]["max_len"] = 8
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    with Scene(spec=str(file)) as scene:
        client = scene.enter_context(Client(scene.service.address, ISO8583))
        client.send(b"A4M04000" + message("0200", 1))
        wait_until(lambda: scene.target.requests)
        scene.say(b"A4M04000" + message("0800", 1), b"A4M04000" + message("0210", 1))
        assert client.receive() == b"A4M04000" + message("0210", 1)


def test_line_is_dropped_only_when_it_is_asked_for():
    """Lines have no types: one that comes unasked is doubt."""
    with Target((), LINE) as target, serving(target) as service:
        service.wait_ready()
        target.say(b"hello\n")
        wait_until(lambda: target.accepted == 2)
