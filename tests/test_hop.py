"""What belongs to one hop and not to clients: keepalive polls, echo tests, sign-ons, and what a target says unasked."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import gevent
import iso8583
import pytest
from iso8583.specs import default_ascii as SPEC

from gmux.codecs.base import Limits
from gmux.codecs.iso8583 import MAX_POLLS, Iso8583Codec
from tests.support.clients import Client
from tests.support.framing import HTTP, ISO8583, LINE, MPU
from tests.support.service import serving
from tests.support.stream import Closed
from tests.support.target import Target, answer, close, pause, send
from tests.support.wait import wait_until

POLLS = {ISO8583: b"\0\0", MPU: b"0000"}
MODES = {"strict": {}, "by order": {"pipeline": "4", "correlation": "order"}, "by key": {"pipeline": "4"}}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def message(mti: str, **fields: str) -> bytes:
    named = {name.lstrip("f"): value for name, value in fields.items()}
    return bytes(iso8583.encode({"t": mti} | named, SPEC)[0])


def read(data: bytes) -> dict[str, str]:
    fields = iso8583.decode(data, SPEC)[0]
    return {name: value for name, value in fields.items() if name not in ("h", "p", "1")}


PURCHASE = message("0200", f11="000001", f41="TERM0001")
ECHO_TEST = message("0800", f7="1122153000", f11="000009", f70="301")
SIGN_ON = message("0800", f7="1122153000", f11="000008", f70="001")


def approve(connection, request):
    """A host's answer to anything."""
    asked = read(request[2:])
    mti = asked["t"]
    fields = {name: asked[name] for name in ("7", "11", "41", "70") if name in asked}
    connection.send(
        ISO8583.wrap(message(f"{mti[:2]}{int(mti[2]) + 1}{mti[3]}", **{f"f{k}": v for k, v in fields.items()}))
    )


class Scene(ExitStack):
    """A target whose connection the test can talk on, and a service that is ready."""

    def __init__(self, framing=ISO8583, behaviour=(answer,), **settings: str) -> None:
        super().__init__()
        self.framing = framing
        self.target = self.enter_context(Target(behaviour, framing))
        self.service = self.enter_context(serving(self.target, **settings))
        self.service.wait_ready()
        wait_until(lambda: self.target.connections)

    @property
    def host(self):
        return self.target.connections[-1]

    def client(self) -> Client:
        return self.enter_context(Client(self.service.address, self.framing))


# Polls.


@pytest.mark.parametrize("framing", POLLS, ids=repr)
def test_poll_of_a_client_is_answered_and_not_forwarded(framing):
    with Scene(framing) as scene:
        client = scene.client()
        client.send_raw(POLLS[framing] * 3)
        assert client.exactly(3 * len(POLLS[framing])) == POLLS[framing] * 3
        client.send_raw(POLLS[framing] + framing.wrap(b"one") + POLLS[framing])
        assert client.exactly(len(POLLS[framing])) == POLLS[framing]
        assert client.receive() == b"one"
        assert client.exactly(len(POLLS[framing])) == POLLS[framing]
        assert scene.target.requests == [b"one"]


@each_mode
@pytest.mark.parametrize("framing", POLLS, ids=repr)
def test_poll_of_the_target_is_answered_on_an_idle_connection_which_stays(framing, mode):
    with Scene(framing, (), **mode) as scene:
        # The target of the tests frames messages, and a poll is one without a payload.
        for number in range(1, 4):
            scene.host.send(POLLS[framing])
            wait_until(lambda number=number: scene.target.requests == [b""] * number)
        assert scene.target.accepted == 1


@each_mode
def test_polls_of_a_target_that_answers_them_too_end_some_time(mode):
    with Scene(behaviour=lambda connection, request: (approve if request[2:] else answer,), **mode) as scene:
        scene.host.send(POLLS[ISO8583])
        wait_until(lambda: len(scene.target.requests) == MAX_POLLS, 20)
        client = scene.client()
        client.send(PURCHASE)
        assert read(client.receive())["t"] == "0210"
        assert len(scene.target.requests) == MAX_POLLS + 1
        assert scene.target.accepted == 1


def test_polls_without_end_are_answered_up_to_a_limit_that_each_message_renews():
    """Two peers that both answer polls would keep each other busy for ever."""
    for decoder in (Iso8583Codec(Limits()).request_decoder(), Iso8583Codec(Limits()).answer_decoder()):
        for _ in range(3):
            owed = 0
            for _ in range(MAX_POLLS // 1000 + 2):
                decoder.receive_data(b"\0\0" * 1000)
                assert decoder.next_event() is None
                owed += len(decoder.take_owed()) // 2
            assert owed == MAX_POLLS
            decoder.receive_data(b"\0\1x")
            assert decoder.next_event().data == b"\0\1x"


# Network management.


@each_mode
def test_answer_network_management_echo_test_of_a_client_takes_no_slot(mode):
    with Scene(behaviour=(approve,), answer_network_management="true", **mode) as scene:
        client = scene.client()
        client.send(ECHO_TEST)
        expected = {"t": "0810", "7": "1122153000", "11": "000009", "39": "00", "70": "301"}
        assert read(client.receive()) == expected
        assert scene.target.requests == []
        client.send(SIGN_ON)
        assert read(client.receive())["t"] == "0810"
        assert scene.target.requests == [SIGN_ON], "a sign-on is the target's to answer"
        client.send(PURCHASE)
        assert read(client.receive())["t"] == "0210"


@each_mode
def test_answer_network_management_approves_no_key_exchange(mode):
    """Nobody would carry it out, and the two sides would have different keys."""
    exchange = message("0800", f7="1122153000", f11="000007", f48="new key", f70="161")
    with Scene(behaviour=(), answer_network_management="true", unsolicited="drop", **mode) as scene:
        scene.host.send(ISO8583.wrap(exchange) + ISO8583.wrap(ECHO_TEST))
        wait_until(lambda: scene.target.requests)
        assert [read(request)["11"] for request in scene.target.requests] == ["000009"]


@each_mode
@pytest.mark.parametrize("own", [ECHO_TEST, SIGN_ON], ids=["echo test", "sign-on"])
def test_answer_network_management_of_the_target_is_answered_by_gmux(own, mode):
    with Scene(behaviour=(), answer_network_management="true", **mode) as scene:
        scene.host.send(ISO8583.wrap(own))
        wait_until(lambda: scene.target.requests)
        assert read(scene.target.requests[0]) == read(own) | {"t": "0810", "39": "00"}
        # And while a request is in flight.
        client = scene.client()
        client.send(PURCHASE)
        wait_until(lambda: len(scene.target.requests) == 2)
        scene.host.send(ISO8583.wrap(own) + ISO8583.wrap(message("0210", f11="000001", f41="TERM0001")))
        assert read(client.receive())["t"] == "0210"
        wait_until(lambda: len(scene.target.requests) == 3)
        assert scene.target.accepted == 1


def test_answer_network_management_with_a_mac_is_left_to_who_can_make_one():
    sealed = message("0800", f7="1122153000", f11="000009", f64="0123456789ABCDEF", f70="301")
    with Scene(behaviour=(approve,), answer_network_management="true") as scene:
        client = scene.client()
        client.send(sealed)
        assert read(client.receive())["t"] == "0810"
        assert scene.target.requests == [sealed]


def test_answer_network_management_off_passes_echo_tests():
    with Scene(behaviour=(approve,)) as scene:
        client = scene.client()
        client.send(ECHO_TEST)
        assert read(client.receive())["t"] == "0810"
        assert scene.target.requests == [ECHO_TEST]


# What nobody asked for.


@each_mode
def test_unsolicited_close_ends_the_connection(mode):
    with Scene(unsolicited="close", **mode) as scene:
        scene.host.send(ISO8583.wrap(message("0620", f11="000001")))
        wait_until(lambda: scene.target.accepted == 2)
        assert scene.target.peak == 1


@each_mode
def test_unsolicited_drop_keeps_it(mode):
    with Scene(behaviour=(approve,), unsolicited="drop", **mode) as scene:
        scene.host.send(ISO8583.wrap(message("0620", f11="000001")) * 2)
        client = scene.client()
        client.send(PURCHASE)
        assert read(client.receive())["t"] == "0210"
        assert scene.target.accepted == 1


@each_mode
def test_unsolicited_broadcast_gives_it_to_every_client(mode):
    notice = message("0620", f11="000001", f48="notice")
    with Scene(behaviour=(approve,), unsolicited="broadcast", **mode) as scene:
        clients = [scene.client() for _ in range(5)]
        scene.service.wait_clients(5)
        clients[0].vanish("reset")
        scene.service.wait_clients(4)
        scene.host.send(ISO8583.wrap(notice))
        assert [client.receive() for client in clients[1:]] == [notice] * 4
        clients[1].send(PURCHASE)
        assert read(clients[1].receive())["t"] == "0210"
        assert scene.target.accepted == 1


def test_unsolicited_broadcast_of_lines_to_clients_of_which_one_does_not_read():
    """A device that publishes; what the slow one has not taken is held for it, up to the limit."""
    line = b"x" * 10_000
    with Scene(LINE, unsolicited="broadcast", spool_limit="200k", spool_memory="64k") as scene:
        slow, quick = scene.client(), scene.client()
        scene.service.wait_clients(2)
        for _ in range(800):
            scene.host.send(LINE.wrap(line))
            assert quick.receive() == line
        wait_until(lambda: len(scene.service.clients) == 1, what="the slow one is cut off at its limit")
        with pytest.raises(Closed):
            slow.rest()


def test_unsolicited_broadcast_faster_than_it_can_be_passed_on_is_dropped_and_what_is_passed_on_is_in_order(
    monkeypatch, caplog
):
    monkeypatch.setattr("gmux.broadcast.MAX_WAITING", 100)
    with Scene(LINE, unsolicited="broadcast") as scene:
        client = scene.client()
        scene.service.wait_clients(1)
        scene.host.send(b"".join(LINE.wrap(b"%029d" % number) for number in range(1000)))
        client.send(b"end")
        wait_until(lambda: "is dropped: 90 bytes of others wait" in caplog.text)
        numbers = []
        while (line := client.receive()) != b"end":
            numbers.append(int(line))
        assert 3 <= len(numbers) < 1000
        assert numbers == sorted(set(numbers))


@each_mode
def test_unsolicited_burst_while_a_request_comes_costs_no_connection(mode):
    """What does not fit in a slice of the loop is put off, and more of it comes until then."""
    notice = ISO8583.wrap(message("0620", f11="000001"))
    with Scene(behaviour=(approve,), unsolicited="drop", **mode) as scene:
        client = scene.client()
        for _ in range(20):
            scene.host.send(notice * 1000)
            client.send(PURCHASE)
            for _ in range(20):
                gevent.sleep(0.0005)
                scene.host.send(notice)
            assert read(client.receive())["t"] == "0210"
        assert scene.target.accepted == 1


def test_unsolicited_flood_without_end_ends_the_connection_and_the_request_goes_on_another(monkeypatch):
    monkeypatch.setattr("gmux.upstream.ENDLESS_TIME", 0.05)
    with Scene(LINE, unsolicited="drop") as scene:
        client = scene.client()
        assert client.ask(b"first") == b"first"

        def flood(host=scene.host):
            with suppress(Closed):
                while host.is_open:
                    host.send(LINE.wrap(b"price 1") * 8000)

        flooding = gevent.spawn(flood)
        gevent.sleep(0.01)
        assert client.ask(b"second") == b"second"
        assert scene.target.accepted == 2
        flooding.join()


def test_unsolicited_banner_that_is_put_off_is_not_the_answer_to_the_greeting(tmp_path):
    (tmp_path / "hello").write_bytes(b"login\n")

    def behave(connection, request):
        return (pause(0.2), send(b"welcome\n")) if request == b"login\n" else (answer,)

    settings = {"unsolicited": "drop", "on_connect": str(tmp_path / "hello"), "connect_delay": "3ms"}
    with ExitStack() as stack:
        target = stack.enter_context(Target(behave, LINE, greeting=(send(b"banner\n" * 6000),)))
        service = stack.enter_context(serving(target, **settings))
        client = stack.enter_context(Client(service.address))
        assert client.ask(b"mine") == b"mine"


def test_unsolicited_half_a_message_by_order_ends_the_connection():
    """Its rest would be taken for the answer to the next request."""
    with Scene(unsolicited="drop") as scene:
        scene.host.send(ISO8583.wrap(message("0620", f11="000001"))[:-1])
        wait_until(lambda: scene.target.accepted == 2)


def test_unsolicited_message_right_behind_an_answer_is_none_of_the_next_client():
    def behaviour(connection, request):
        asked = read(request[2:])
        own = message("0620", f11=asked["11"])
        connection.send(ISO8583.wrap(message("0210", f11=asked["11"])) + ISO8583.wrap(own))
        return ()

    for mode in MODES.values():
        with Scene(behaviour=behaviour, unsolicited="drop", **mode) as scene:
            client = scene.client()
            for number in range(5):
                client.send(message("0200", f11=f"{number:06}"))
                assert read(client.receive()) == {"t": "0210", "11": f"{number:06}"}
            assert scene.target.accepted == 1


# A greeting.


def greeting(tmp_path, data: bytes) -> str:
    path = tmp_path / "greeting"
    path.write_bytes(data)
    return str(path)


@each_mode
def test_on_connect_is_sent_first_on_each_connection_and_its_answer_waited_for(mode, tmp_path):
    held = []

    def behaviour(connection, request):
        if read(request[2:])["t"] == "0800" and not held:
            held.append((connection, request))
            return ()
        return (approve,)

    with ExitStack() as stack:
        target = stack.enter_context(Target(behaviour, ISO8583))
        service = stack.enter_context(serving(target, on_connect=greeting(tmp_path, SIGN_ON), **mode))
        clients = [stack.enter_context(Client(service.address, ISO8583)) for _ in range(3)]
        for number, client in enumerate(clients):
            client.send(message("0200", f11=f"{number:06}", f41="TERM0001"))
        wait_until(lambda: held and service.waiting == 3)
        assert target.requests == [SIGN_ON]
        approve(*held[0])
        for client in clients:
            assert read(client.receive())["t"] == "0210"
        target.connections[-1].cut()
        clients[0].send(PURCHASE)
        assert read(clients[0].receive())["t"] == "0210"
        assert [read(request)["t"] for request in target.requests].count("0800") == 2
        assert read(target.requests[-1])["t"] == "0200"


@each_mode
def test_on_connect_that_is_answered_right_before_the_end_is_no_failed_connect(mode, tmp_path, caplog):
    ends = 0

    def behaviour(connection, request):
        nonlocal ends
        if read(request[2:])["t"] == "0800" and ends < 3:
            ends += 1
            # After more than --retry-delay: it is no connection that the target took only to end it.
            return (pause(0.03), approve, close)
        return (approve,)

    settings = mode | {"on_connect": greeting(tmp_path, SIGN_ON), "retry_delay": "10ms"}
    with Target(behaviour, ISO8583) as target, serving(target, **settings) as service:
        with Client(service.address, ISO8583) as client:
            client.send(PURCHASE)
            assert read(client.receive())["t"] == "0210"
        assert target.accepted == 4
    assert "next attempt" not in caplog.text


@each_mode
@pytest.mark.parametrize("fault", ["silent", "closes"])
def test_on_connect_without_an_answer_is_a_failed_connect_and_no_busy_loop(fault, mode, tmp_path):
    def behaviour(connection, request):
        if fault == "closes":
            connection.close()
        return ()

    settings = {"on_connect": greeting(tmp_path, SIGN_ON), "timeout": "50ms", "retry_delay": "10s"} | mode
    with Target(behaviour, ISO8583) as target, serving(target, **settings) as service, ExitStack() as stack:
        client = stack.enter_context(Client(service.address, ISO8583))
        client.send(PURCHASE)
        with pytest.raises(Closed):
            client.receive()
        assert target.accepted == 1
        assert target.requests == [SIGN_ON]


@each_mode
def test_on_connect_answered_and_the_connection_ended_is_a_failed_connect_too(mode, tmp_path):
    """As by a host that declines a sign-on."""

    def behaviour(connection, request):
        approve(connection, request)
        connection.close()
        return ()

    settings = {"on_connect": greeting(tmp_path, SIGN_ON), "retry_delay": "10s"} | mode
    with Target(behaviour, ISO8583) as target, serving(target, **settings) as service, ExitStack() as stack:
        wait_until(lambda: service.pool._retry_timer is not None)
        client = stack.enter_context(Client(service.address, ISO8583))
        client.send(PURCHASE)
        with pytest.raises(Closed):
            client.receive()
        assert target.accepted == 1


def test_on_connect_greets_with_a_line(tmp_path):
    with Scene(LINE, on_connect=greeting(tmp_path, b"hello\n")) as scene:
        client = scene.client()
        assert client.ask(b"one") == b"one"
        assert scene.target.requests == [b"hello", b"one"]


# A check.


@each_mode
def test_idle_check_asks_an_idle_connection_for_a_sign_of_life(mode):
    with Scene(behaviour=(approve,), idle_check="50ms", **mode) as scene:
        wait_until(lambda: len(scene.target.requests) >= 2)
        first, second = map(read, scene.target.requests[:2])
        assert (first["t"], first["70"], len(first["7"])) == ("0800", "301", 10)
        assert int(second["11"]) == int(first["11"]) + 1
        client = scene.client()
        client.send(PURCHASE)
        assert read(client.receive())["t"] == "0210"
        assert scene.target.accepted == 1


@each_mode
def test_idle_check_without_an_answer_ends_the_connection_and_makes_another(mode):
    with Scene(behaviour=(), idle_check="50ms", timeout="50ms", **mode) as scene:
        wait_until(lambda: scene.target.accepted >= 2)
        assert scene.target.peak == 1


@each_mode
def test_idle_check_does_not_make_a_connection_one_that_is_used(mode):
    settings = {"idle_check": "50ms", "upstream_idle_timeout": "200ms", "pool_min": "0"} | mode
    with Target((approve,), ISO8583) as target, serving(target, **settings) as service, ExitStack() as stack:
        client = stack.enter_context(Client(service.address, ISO8583))
        client.send(PURCHASE)
        assert read(client.receive())["t"] == "0210"
        wait_until(lambda: target.open == 0)
        assert len(target.requests) > 1


@each_mode
def test_unsolicited_broadcast_comes_behind_the_answer_that_was_before_it(mode):
    notice = message("0620", f11="000005")

    def behaviour(connection, request):
        connection.send(ISO8583.wrap(message("0210", f11="000001", f41="TERM0001")) + ISO8583.wrap(notice))
        return ()

    with Scene(behaviour=behaviour, unsolicited="broadcast", **mode) as scene:
        client = scene.client()
        client.send(PURCHASE)
        assert read(client.receive())["t"] == "0210"
        assert client.receive() == notice


def test_http_has_no_unsolicited_messages():
    with Scene(HTTP) as scene:
        scene.host.send(HTTP.wrap(b"nobody"))
        wait_until(lambda: scene.target.accepted == 2)
