"""Requests in flight whose answers come in any order: ISO 8583 by message type and key fields."""

from __future__ import annotations

import copy
import json
import random
from contextlib import ExitStack, suppress

import gevent
import iso8583
import pytest
from gevent import socket
from gevent.lock import Semaphore
from iso8583.specs import default
from iso8583.specs import default_ascii as SPEC

import gmux.by_key
from gmux.pipelined_pool import PipelinedPool
from tests.support.clients import Client
from tests.support.framing import ISO8583
from tests.support.service import serving
from tests.support.stream import Closed
from tests.support.target import Target, close, reset
from tests.support.wait import wait_until

KEY = {"pipeline": "16", "timeout": "5s"}


def message(mti: str, stan: int, terminal: int = 1, **fields: str) -> bytes:
    named = {name.lstrip("f"): value for name, value in fields.items()}
    return bytes(iso8583.encode({"t": mti, "11": f"{stan:06}", "41": f"T{terminal:07}"} | named, SPEC)[0])


def read(data: bytes) -> dict[str, str]:
    return iso8583.decode(data, SPEC)[0]


def answer_to(request: bytes) -> bytes:
    """With the token that the request carries in field 48."""
    asked = read(request)
    kind = asked["t"]
    fields = {name: asked[name] for name in ("11", "41", "48") if name in asked}
    return bytes(iso8583.encode(fields | {"t": f"{kind[:2]}{int(kind[2]) + 1}{kind[3]}", "39": "00"}, SPEC)[0])


class Host:
    """A target that writes down what comes, and answers when and as the test says."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.connections: list = []

    def __call__(self, connection, request):
        self.requests.append(request[2:])
        self.connections.append(connection)
        return ()

    def say(self, at: int, data: bytes) -> None:
        """Send `data` on the connection of the request with this number."""
        self.connections[at].send(ISO8583.wrap(data))

    def answer(self, at: int) -> None:
        self.say(at, answer_to(self.requests[at]))


class Scene(ExitStack):
    def __init__(self, **settings: str) -> None:
        super().__init__()
        self.host = Host()
        self.target = self.enter_context(Target(self.host, ISO8583))
        self.service = self.enter_context(serving(self.target, **KEY | settings))
        self.service.wait_ready()
        # What is still in flight when the clients are gone must not keep the end of each test waiting.
        self.service.pool._discarding._seconds = 0.05

    def client(self) -> Client:
        return self.enter_context(Client(self.service.address, ISO8583))

    def ask(self, *requests: bytes) -> list[Client]:
        """Each request by a client of its own, in this order; those that wait are not waited for."""
        clients = []
        for request in requests:
            before = len(self.host.requests) + self.service.waiting
            client = self.client()
            client.send(request)
            clients.append(client)
            wait_until(lambda before=before: len(self.host.requests) + self.service.waiting > before)
        return clients


def test_answers_in_any_order_find_their_requests():
    with Scene() as scene:
        clients = scene.ask(*(message("0200", number) for number in range(10)))
        order = list(range(10))
        random.Random(1).shuffle(order)
        for at in order:
            scene.host.answer(at)
        for number, client in enumerate(clients):
            assert read(client.receive())["11"] == f"{number:06}"
        assert scene.target.accepted == 1


def test_kinds_of_message_with_one_number_are_apart():
    with Scene() as scene:
        kinds = ["0200", "0220", "0400", "0420", "0100"]
        clients = scene.ask(*(message(kind, 7) for kind in kinds))
        for at in reversed(range(len(kinds))):
            scene.host.answer(at)
        answers = ["0210", "0230", "0410", "0430", "0110"]
        assert [read(client.receive())["t"] for client in clients] == answers


def test_two_clients_with_one_key_the_second_waits_and_others_pass():
    with Scene() as scene:
        same = message("0200", 7)
        first, second, other = scene.ask(same, same, message("0200", 8))
        assert scene.host.requests == [same, message("0200", 8)]
        assert scene.service.waiting == 1
        scene.host.answer(1)
        assert read(other.receive())["11"] == "000008"
        scene.host.say(0, answer_to(message("0200", 7, f48="first")))
        assert read(first.receive())["48"] == "first"
        wait_until(lambda: len(scene.host.requests) == 3)
        scene.host.say(2, answer_to(message("0200", 7, f48="second")))
        assert read(second.receive())["48"] == "second"


def test_two_clients_with_one_key_the_second_takes_another_connection():
    with Scene(pool_size="2") as scene:
        same = message("0200", 7)
        first, second = scene.ask(same, same)
        wait_until(lambda: len(scene.host.requests) == 2)
        assert scene.host.connections[0] is not scene.host.connections[1]
        scene.host.say(1, answer_to(message("0200", 7, f48="second")))
        scene.host.say(0, answer_to(message("0200", 7, f48="first")))
        assert read(first.receive())["48"] == "first"
        assert read(second.receive())["48"] == "second"


def test_timeout_fails_its_request_alone_and_the_connection_stays():
    with Scene(timeout="150ms") as scene:
        (lost,) = scene.ask(message("0200", 1))
        with pytest.raises(Closed):
            lost.receive()
        (client,) = scene.ask(message("0200", 2))
        scene.host.answer(1)
        assert read(client.receive())["11"] == "000002"
        assert scene.target.accepted == 1


def test_late_answer_is_dropped_and_never_that_of_a_new_request_with_its_key():
    with Scene(timeout="100ms", queue_timeout="5s") as scene:
        same = message("0200", 1)
        (lost,) = scene.ask(same)
        with pytest.raises(Closed):
            lost.receive()
        (again,) = scene.ask(same)
        assert scene.service.waiting == 1
        scene.host.say(0, answer_to(message("0200", 1, f48="late")))
        wait_until(lambda: len(scene.host.requests) == 2)
        scene.host.say(1, answer_to(message("0200", 1, f48="new")))
        assert read(again.receive())["48"] == "new"
        assert scene.target.accepted == 1


def test_late_window_over_frees_the_key():
    with Scene(timeout="100ms", queue_timeout="5s", late_window="200ms") as scene:
        same = message("0200", 1)
        (lost,) = scene.ask(same)
        with pytest.raises(Closed):
            lost.receive()
        (again,) = scene.ask(same)
        wait_until(lambda: len(scene.host.requests) == 2)
        scene.host.answer(1)
        assert read(again.receive())["11"] == "000001"


def test_key_that_is_reserved_on_one_connection_goes_on_another():
    with Scene(timeout="100ms", pool_size="2", pool_min="1") as scene:
        same = message("0200", 1)
        (lost,) = scene.ask(same)
        with pytest.raises(Closed):
            lost.receive()
        (again,) = scene.ask(same)
        wait_until(lambda: len(scene.host.requests) == 2)
        assert scene.host.connections[0] is not scene.host.connections[1]
        scene.host.answer(1)
        assert read(again.receive())["11"] == "000001"


@pytest.mark.parametrize("bitmap", ["p", "1"])
def test_bitmap_whose_length_is_written_wrongly_in_the_spec_gives_nobody_the_answer_of_another(bitmap, tmp_path):
    """In hexadecimal digits, for one in binary. Eight bytes too far the time is where the number should be."""
    spec = copy.deepcopy(default)
    spec[bitmap]["max_len"] = 16
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))

    def write(mti: str, stan: int, time: str) -> bytes:
        fields = {"11": f"{stan:06}", "12": time, "13": "1125", "41": f"TERM{stan:04}", "42": "M" * 15, "70": "001"}
        return bytes(iso8583.encode(fields | {"t": mti}, spec)[0])

    with Scene(spec=str(path)) as scene:
        first, second = scene.ask(write("0200", 123, "153001"), write("0200", 124, "153002"))
        # The host writes its own time: it is behind.
        scene.host.say(1, write("0210", 124, "153001"))
        scene.host.say(0, write("0210", 123, "153000"))
        for client, terminal in ((first, "TERM0123"), (second, "TERM0124")):
            assert iso8583.decode(client.receive(), spec)[0]["41"] == terminal


@pytest.mark.parametrize("end", [close, reset])
def test_connection_that_ends_fails_all_in_flight_and_none_is_sent_again(end):
    with Scene() as scene:
        clients = scene.ask(*(message("0200", number) for number in range(4)))
        scene.host.answer(2)
        assert read(clients[2].receive())["11"] == "000002"
        end(scene.host.connections[0], b"")
        for at in (0, 1, 3):
            with pytest.raises(Closed):
                clients[at].receive()
        (next_,) = scene.ask(message("0200", 9))
        wait_until(lambda: len(scene.host.requests) == 5)
        scene.host.answer(4)
        assert read(next_.receive())["11"] == "000009"


def test_answer_that_nobody_asked_for_is_dropped_and_the_connection_stays():
    with Scene() as scene:
        (client,) = scene.ask(message("0200", 1))
        scene.host.say(0, answer_to(message("0200", 99)))
        scene.host.say(0, message("0800", 5))
        scene.host.answer(0)
        assert read(client.receive())["11"] == "000001"
        scene.host.say(0, answer_to(message("0200", 98)))
        (client,) = scene.ask(message("0200", 2))
        scene.host.answer(1)
        assert read(client.receive())["11"] == "000002"
        assert scene.target.accepted == 1


def test_message_of_the_target_that_is_none_ends_the_connection_and_all_in_flight():
    with Scene() as scene:
        clients = scene.ask(message("0200", 1), message("0200", 2))
        scene.host.say(0, b"garbage")
        for client in clients:
            with pytest.raises(Closed):
                client.receive()


def test_request_without_a_readable_key_is_refused_and_never_sent():
    with Scene() as scene:
        for broken in (b"garbage", message("0200", 1)[:25]):
            client = scene.client()
            client.send(broken)
            with pytest.raises(Closed):
                client.receive()
        assert scene.host.requests == []


def test_client_that_is_gone_takes_nothing_from_others():
    with Scene() as scene:
        clients = scene.ask(*(message("0200", number) for number in range(3)))
        clients[1].reset()
        scene.service.wait_clients(2)
        for at in (2, 1, 0):
            scene.host.answer(at)
        assert read(clients[0].receive())["11"] == "000000"
        assert read(clients[2].receive())["11"] == "000002"
        assert scene.target.accepted == 1


def test_answer_of_a_client_is_nobodys_and_its_connection_stays():
    """A client may answer what was broadcast."""
    with Scene() as scene:
        client = scene.client()
        client.send(message("0810", 1))
        client.send(message("0200", 2))
        wait_until(lambda: scene.host.requests)
        scene.host.answer(0)
        assert read(client.receive())["11"] == "000002"
        assert scene.host.requests == [message("0200", 2)]


@pytest.mark.parametrize("policy", ["broadcast", "close"])
def test_answer_that_fits_no_request_is_dropped_whatever_is_done_with_other_messages(policy):
    """It is some client's: nobody else may see it."""
    with Scene(unsolicited=policy) as scene:
        first, other = scene.ask(message("0200", 1), message("0200", 2))
        scene.host.answer(0)
        scene.host.answer(0)
        scene.host.answer(1)
        assert read(first.receive())["11"] == "000001"
        assert read(other.receive())["11"] == "000002"
        assert scene.target.accepted == 1


def test_many_that_wait_for_one_key_hold_up_nobody_else():
    with Scene(pipeline="2", queue_timeout="10s") as scene:
        same = message("0200", 1)
        first, _ = scene.ask(same, message("0200", 2))
        wait_until(lambda: len(scene.host.requests) == 2)
        blocked = [scene.client() for _ in range(100)]
        for client in blocked:
            client.send(same)
        wait_until(lambda: scene.service.waiting == 100)
        (victim,) = scene.ask(message("0200", 3))
        scene.host.answer(1)
        wait_until(lambda: len(scene.host.requests) == 3)
        scene.host.answer(2)
        assert read(victim.receive())["11"] == "000003"
        for client in (first, *blocked):
            client.vanish("reset")


def test_target_that_says_nothing_at_all_loses_its_connection_after_some_requests():
    with Scene(timeout="50ms") as scene:
        for number in range(3):
            (client,) = scene.ask(message("0200", number))
            with pytest.raises(Closed):
                client.receive()
        wait_until(lambda: scene.target.accepted == 2)
        assert scene.target.peak == 1


def test_prefer_pipeline_opens_for_requests_that_cannot_share():
    with Scene(prefer_pipeline="true", pool_size="4") as scene:
        clients = scene.ask(*[message("0200", 7)] * 4)
        wait_until(lambda: len(scene.host.requests) == 4)
        assert len(set(map(id, scene.host.connections))) == 4
        for client in clients:
            client.vanish("reset")


@pytest.mark.parametrize("size", ["1", "2", "4"])
def test_every_answer_belongs_to_its_request_with_collisions_losses_late_answers_and_resets(size):
    """50 clients draw from few keys; the target answers in random order, late, twice, not at all, or resets."""
    dice = random.Random(f"by key {size}")
    told = {"answered": 0, "closed": 0}

    def behaviour(connection, request):
        fate = dice.random()
        if fate < 0.01:
            return (reset,)
        if fate < 0.04:
            return ()

        def later() -> None:
            gevent.sleep(dice.choice([0, 0, 0.001, 0.003, 0.01, 0.25]))
            with suppress(Closed):
                connection.send(ISO8583.wrap(answer_to(request[2:])) * (2 if dice.random() < 0.03 else 1))

        gevent.spawn(later)
        return ()

    settings = {"pipeline": "8", "timeout": "150ms", "late_window": "1s", "queue_timeout": "3s", "pool_size": size}
    with Target(behaviour, ISO8583) as target, serving(target, **settings) as service:

        def use(number: int) -> None:
            own = random.Random(number)
            for n in range(12):
                token = f"{number}.{n}"
                request = message("0200", own.randrange(30), own.randrange(2), f48=token)
                with Client(service.address, ISO8583) as client:
                    client.send(request)
                    try:
                        assert read(client.receive())["48"] == token
                        told["answered"] += 1
                    except Closed:
                        told["closed"] += 1

        gevent.joinall([gevent.spawn(use, number) for number in range(50)], raise_error=True)
        assert target.peak <= int(size)
    assert sum(told.values()) == 600
    assert told["answered"] > 200


def test_spec_whose_bitmap_has_another_max_len_gives_nobody_the_answer_of_another(tmp_path):
    """pyiso8583 goes by the encoding alone. With max_len, number 000123 was read as 001125, as was another's."""
    spec = {name: dict(field) for name, field in SPEC.items()}
    spec["p"]["max_len"] = 8
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    with Scene(spec=str(file)) as scene:
        requests = [message("0200", stan, terminal, f3="000000") for stan, terminal in [(123, 1), (124, 2), (125, 3)]]
        clients = scene.ask(*requests)
        for at in (2, 0, 1):
            scene.host.answer(at)
        for stan, client in zip((123, 124, 125), clients, strict=True):
            assert read(client.receive())["11"] == f"{stan:06}"


def test_clients_that_leave_a_slow_target_cost_nobody_the_connection():
    """That they left says nothing of the target; only requests that time out do."""
    with Scene() as scene:
        good, *others = scene.ask(*(message("0200", number) for number in range(5)))
        for other in others:
            other.vanish("reset")
        scene.service.wait_clients(1)
        wait_until(lambda: not scene.service.pool._discarding, what="their requests are given up")
        scene.host.answer(0)
        assert read(good.receive())["11"] == "000000"
        # Their answers, when they come, are nobody's, also not that of a new request with the same key.
        [again] = scene.ask(message("0200", 2))
        scene.host.say(2, answer_to(message("0200", 2, f48="of the one that left")))
        wait_until(lambda: len(scene.host.requests) == 6)
        scene.host.say(5, answer_to(message("0200", 2, f48="own")))
        assert read(again.receive())["48"] == "own"
        assert scene.target.accepted == 1


def test_clients_that_leave_while_their_requests_are_not_out_cost_nobody_the_connection():
    """What comes behind half a request is a part of it to the target, so it keeps its place until it is out."""
    gate = Semaphore(0)
    filling = "x" * 900

    def behaviour(connection, request):
        if read(request[2:])["11"] == "000000":
            gate.acquire()  # until then nothing is read
        connection.send(ISO8583.wrap(answer_to(request[2:])))
        return ()

    big = {"pipeline": "3000", "max_clients": "3000"}
    with Target(behaviour, ISO8583) as target, serving(target, **KEY | big) as service, ExitStack() as stack:
        service.wait_ready()
        service.pool._discarding._seconds = 0.05
        (upstream,) = service.pool._upstreams
        # With little room in between, few requests fill it.
        upstream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        target.connections[0].sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        clients = []
        while upstream._writer is None:
            assert len(clients) < 2000, "the socket takes all"
            client = stack.enter_context(Client(service.address, ISO8583))
            client.send(message("0200", len(clients), f48=filling))
            clients.append(client)
            wait_until(lambda: upstream.load == len(clients))
            gevent.sleep(0)
        assert len(clients) > 1
        for _ in range(3):
            before = upstream.load
            client = stack.enter_context(Client(service.address, ISO8583))
            client.send(message("0200", 5000 + before, f48=filling))
            wait_until(lambda before=before: upstream.load > before)
            client.vanish("reset")
        wait_until(lambda: len(service.pool._discarding) == 3)
        gevent.sleep(0.15)  # they are looked at more than once
        assert not upstream.is_closing
        gate.release()
        for number, client in enumerate(clients):
            assert read(client.receive())["11"] == f"{number:06}"
        assert target.accepted == 1


def test_late_answers_by_the_thousand_leave_the_queue_alone(monkeypatch):
    """That is what a host sends after it stood still. Each cost a walk over all that wait, and a call of the loop."""
    looked_at = 0
    begin = PipelinedPool._begin

    def counting(pool, exchange):
        nonlocal looked_at
        looked_at += 1
        return begin(pool, exchange)

    with Scene(pipeline="1", correlation="key") as scene:
        first, *others = scene.ask(*(message("0200", number) for number in range(50)))
        monkeypatch.setattr(PipelinedPool, "_begin", counting)
        late = ISO8583.wrap(answer_to(message("0200", 999)))
        scene.host.connections[0].send(late * 2000 + ISO8583.wrap(answer_to(message("0200", 0))))
        assert read(first.receive())["11"] == "000000"
        assert looked_at == 0
        for at, other in enumerate(others, 1):
            wait_until(lambda at=at: len(scene.host.requests) > at)
            scene.host.answer(at)
            assert read(other.receive())["11"] == f"{at:06}"


@pytest.mark.parametrize("window", ["0", "1h"])
def test_connection_on_which_too_many_keys_are_reserved_is_replaced(window, monkeypatch):
    monkeypatch.setattr(gmux.by_key, "MAX_LATE", 2)
    with Scene(late_window=window, timeout="100ms", pipeline="4") as scene:
        # The target says something between, so it is not dead.
        for number in range(2):
            lost, answered = scene.ask(message("0200", 10 + number), message("0200", number))
            scene.host.answer(2 * number + 1)
            assert read(answered.receive())["11"] == f"{number:06}"
            lost.receive_end()
        # A repeat of a lost one, on another connection: its key is free there.
        (again,) = scene.ask(message("0201", 10))
        wait_until(lambda: len(scene.host.requests) == 5)
        assert scene.host.connections[4] is not scene.host.connections[0]
        assert scene.target.peak == 1
        scene.host.answer(4)
        assert read(again.receive())["t"] == "0211"


def test_connection_on_which_too_many_keys_are_reserved_takes_no_more_while_others_are_in_flight(monkeypatch):
    monkeypatch.setattr(gmux.by_key, "MAX_LATE", 1)
    with Scene(late_window="1h", timeout="1s", pipeline="4") as scene:
        (lost,) = scene.ask(message("0200", 1))
        gevent.sleep(0.5)  # so that this one is in flight for longer
        (busy,) = scene.ask(message("0200", 2))
        wait_until(lambda: len(scene.host.requests) == 2)
        lost.receive_end()
        (next_,) = scene.ask(message("0200", 3))
        wait_until(lambda: scene.service.waiting == 1)
        scene.host.answer(1)
        assert read(busy.receive())["11"] == "000002"
        wait_until(lambda: len(scene.host.requests) == 3)
        assert scene.host.connections[2] is not scene.host.connections[0]
        scene.host.answer(2)
        assert read(next_.receive())["11"] == "000003"
