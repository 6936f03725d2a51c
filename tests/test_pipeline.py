"""Several requests in flight on one upstream connection, answered by order: `--pipeline`, `--prefer-pipeline`."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import gevent
import pytest
from gevent.lock import Semaphore

from gmux import net
from gmux.errors import ConnectError
from tests.support.clients import Client, tagged
from tests.support.framing import HTTP, LINE, Framing
from tests.support.service import Service, serving
from tests.support.stream import Closed
from tests.support.target import Target, answer, close, garbage, reset, send
from tests.support.wait import wait_until


def get(path: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return method + b" /" + path + b" HTTP/" + version + b"\r\nHost: a\r\n\r\n"


class Script:
    """A target that holds its answers until `release` is called, which answers all that are held by steps.

    `held` has the paths, or lines, of each connection's requests that are not answered.
    """

    def __init__(self, framing) -> None:
        self.framing = framing
        self.is_free = True
        self.held: dict = {}
        self.log: list[bytes] = []

    def __call__(self, connection, request):
        name = self.framing.payload(request)
        self.log.append(name)
        if self.is_free:
            return (answer,)
        self.held.setdefault(connection, []).append(request)
        return ()

    @property
    def names(self) -> list[list[bytes]]:
        return [[self.framing.payload(request) for request in requests] for requests in self.held.values()]

    def count(self) -> int:
        return sum(len(requests) for requests in self.held.values())

    def release(self, *then) -> None:
        """Answer everything that is held, in order; or, by connection, take these steps for its first request."""
        held, self.held = self.held, {}
        for connection, requests in held.items():
            for step in then:
                step(connection, requests[0])
            for request in requests if not then else []:
                answer(connection, request)


class Scene(ExitStack):
    """A target with a script, gmux before it, and clients."""

    def __init__(self, framing, **settings: str) -> None:
        super().__init__()
        self.framing = framing
        self.script = Script(framing)
        self.target = self.enter_context(Target(self.script, framing))
        self.service = self.enter_context(serving(self.target, **settings))
        self.service.wait_ready()
        # What is still in flight when the clients are gone must not keep the end of each test waiting.
        self.service.pool._discarding._seconds = 0.05

    def client(self) -> Client:
        return self.enter_context(Client(self.service.address, self.framing))

    def warm(self) -> None:
        """HTTP goes several at a time only after a probe, which runs when a request waits for another one's answer."""
        warm(self.service, self.client(), self.client())
        self.script.log.clear()

    def hold(self) -> None:
        self.script.is_free = False

    def ask_all(self, *requests: bytes) -> list[Client]:
        """Each request by a client of its own, in this order."""
        clients = []
        for number, request in enumerate(requests, 1):
            client = self.client()
            client.send_raw(request)
            clients.append(client)
            wait_until(lambda number=number: self.service.waiting + self.script.count() >= number)
        return clients


def warm(service: Service, first: Client, second: Client) -> None:
    """Get the licence to put requests behind one another."""
    for client in (first, second):
        client.send_raw(get(b"warm"))
    assert [HTTP.payload(HTTP.read(client)) for client in (first, second)] == [b"warm"] * 2
    assert service.pool.licence.is_granted


def ask(client: Client, path: bytes) -> bytes:
    client.send_raw(get(path))
    return HTTP.payload(HTTP.read(client))


def status(client: Client) -> bytes:
    return HTTP.read(client)[9:12]


def test_pipeline_puts_so_many_requests_on_one_connection_and_no_more():
    with Scene(LINE, pipeline="3") as scene:
        scene.hold()
        clients = scene.ask_all(*(b"%d\n" % number for number in range(5)))
        wait_until(lambda: scene.script.count() == 3)
        assert scene.script.names == [[b"0", b"1", b"2"]]
        assert scene.service.waiting == 2
        scene.script.release()
        wait_until(lambda: scene.script.count() == 2)
        scene.script.release()
        assert [client.receive() for client in clients] == [b"%d" % number for number in range(5)]
        assert scene.target.peak == 1


@pytest.mark.parametrize("size", ["1", "2"])
def test_pipeline_answers_of_many_clients_are_their_own(size):
    """The requests of 40 clients at once, in all orders that their sockets make."""
    with Target((answer,), LINE) as target, serving(target, pipeline="8", pool_size=size) as service:

        def use(number):
            with Client(service.address) as client:
                for n in range(20):
                    assert client.ask(tagged(number, n)) == tagged(number, n)

        gevent.joinall([gevent.spawn(use, number) for number in range(40)], raise_error=True)
        assert target.peak <= int(size)


def test_pipeline_requests_of_one_turn_go_out_in_one_write():
    reads = []

    def behaviour(connection, request):
        reads.append(connection)
        return (answer,)

    with Scene(LINE, pipeline="64") as scene:
        scene.hold()
        first = scene.ask_all(b"first\n")
        clients = [scene.client() for _ in range(30)]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        wait_until(lambda: scene.script.count() == 31)
        scene.script.release()
        assert first[0].receive() == b"first"
        assert [client.receive() for client in clients] == [b"%d" % number for number in range(30)]


def test_pipeline_opens_connections_before_it_stacks_requests():
    with Scene(LINE, pipeline="4", pool_size="3") as scene:
        scene.hold()
        for number in range(3):
            scene.ask_all(b"%d\n" % number)
            wait_until(lambda number=number: scene.script.count() == number + 1)
            assert scene.target.accepted == number + 1
        for number in range(3, 6):
            scene.ask_all(b"%d\n" % number)
            wait_until(lambda number=number: scene.script.count() == number + 1)
        assert [len(names) for names in scene.script.names] == [2, 2, 2]
        scene.script.release()


def test_pipeline_takes_the_connection_with_the_fewest_in_flight():
    with Scene(LINE, pipeline="8", pool_size="2", pool_min="2") as scene:
        scene.hold()
        scene.ask_all(*(b"%d\n" % number for number in range(8)))
        wait_until(lambda: scene.script.count() == 8)
        assert sorted(len(names) for names in scene.script.names) == [4, 4]
        scene.script.release()


def test_pipeline_shares_a_connection_when_another_cannot_be_made_at_once(monkeypatch):
    with Scene(LINE, pipeline="4", pool_size="2") as scene:
        gate = Semaphore(0)

        def connect(address, seconds):
            gate.acquire()
            raise ConnectError("no")

        monkeypatch.setattr(net, "connect", connect)
        scene.hold()
        scene.ask_all(b"0\n", b"1\n")
        wait_until(lambda: scene.script.count() == 2)
        assert scene.script.names == [[b"0", b"1"]]
        scene.script.release()
        gate.release()


def test_prefer_pipeline_fills_a_connection_before_another_is_opened():
    with Scene(LINE, pipeline="3", pool_size="2", prefer_pipeline="true") as scene:
        scene.hold()
        scene.ask_all(b"0\n", b"1\n", b"2\n")
        assert scene.service.connected == 1
        scene.ask_all(b"3\n")
        wait_until(lambda: scene.script.count() == 4)
        assert scene.target.accepted == 2
        scene.script.release()


# By order, when something goes wrong.


def test_pipeline_timeout_ends_all_that_is_in_flight_and_the_connection():
    with Scene(LINE, pipeline="4", timeout="100ms") as scene:
        scene.hold()
        clients = scene.ask_all(b"0\n", b"1\n", b"2\n")
        assert [client.outcome(b"") for client in clients] == ["closed"] * 3
        scene.script.is_free = True
        with Client(scene.service.address) as client:
            assert client.ask(b"next") == b"next"
        assert scene.target.accepted == 2
        assert scene.script.log == [b"0", b"1", b"2", b"next"]


@pytest.mark.parametrize("end", [close, reset, garbage], ids=["close", "reset", "garbage"])
def test_pipeline_lines_that_are_in_flight_when_the_connection_ends_are_not_sent_again(end):
    """An echo request may have been carried out: invariant 5. (Any bytes are a line: garbage has no end.)"""
    with Scene(LINE, pipeline="4", timeout="200ms") as scene:
        scene.hold()
        clients = scene.ask_all(b"0\n", b"1\n")
        scene.script.release(send(b"0\n"), *([send(b"half"), close] if end is garbage else [end]))
        assert clients[0].receive() == b"0"
        with pytest.raises(Closed):
            clients[1].receive()
        assert scene.script.log == [b"0", b"1"]


def test_pipeline_of_one_client_that_is_gone_drops_its_answer_alone():
    with Scene(LINE, pipeline="4") as scene:
        scene.hold()
        clients = scene.ask_all(b"0\n", b"1\n", b"2\n")
        clients[1].reset()
        scene.service.wait_clients(2)
        scene.script.release()
        assert clients[0].receive() == b"0"
        assert clients[2].receive() == b"2"
        assert scene.target.accepted == 1


def test_pipeline_connection_of_age_is_replaced_under_load_that_never_ends():
    with Target((answer,), LINE) as target, serving(target, pipeline="4", upstream_max_age="30ms") as service:

        def use(number):
            with Client(service.address) as client:
                while target.accepted < 4:
                    assert client.ask(tagged(number, 0)) == tagged(number, 0)

        gevent.joinall([gevent.spawn(use, number) for number in range(6)], raise_error=True)
        assert target.peak == 1


# HTTP.


def test_pipeline_http_waits_for_one_answer_on_each_connection():
    """RFC 9112 section 9.3.2: a target that may not keep its connection would lose what is behind the first."""
    with Scene(HTTP, pipeline="8") as scene:
        scene.hold()
        clients = scene.ask_all(get(b"0"), get(b"1"), get(b"2"))
        wait_until(lambda: scene.script.count() == 1)
        assert scene.service.waiting == 2
        scene.script.release()
        wait_until(lambda: scene.script.count() == 2)
        scene.script.release()
        assert [HTTP.payload(HTTP.read(client)) for client in clients] == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    "version", [b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n", b"HTTP/1.1 200 OK\r\nKeep-Alive: max=5\r\n"]
)
def test_pipeline_http_is_not_for_targets_that_may_not_take_it(version):
    def old(connection, request):
        connection.send(version + b"Content-Length: 2\r\n\r\nok")

    scripted = []

    def behaviour(connection, request):
        scripted.append(request)
        return (old,) if len(scripted) == 1 else ()

    with ExitStack() as stack:
        target = stack.enter_context(Target(behaviour, HTTP))
        service = stack.enter_context(serving(target, pipeline="8", timeout="300ms"))
        clients = [stack.enter_context(Client(service.address, HTTP)) for _ in range(3)]
        assert ask(clients[0], b"warm") == b"ok"
        for client in clients:
            client.send_raw(get(b"x", b"POST"))
        wait_until(lambda: len(scripted) == 2)
        assert service.waiting == 2
        for client in clients:
            assert status(client) == b"504"


def test_pipeline_http_stacks_nothing_behind_a_request_that_is_not_safe_and_it_waits_for_all_before():
    with Scene(HTTP, pipeline="8") as scene:
        scene.warm()
        scene.hold()
        clients = scene.ask_all(
            get(b"0"), get(b"1", b"HEAD"), get(b"2", b"PUT"), get(b"3"), get(b"4", b"POST"), get(b"5")
        )
        wait_until(lambda: scene.script.count() == 2)
        for names in ([b"0", b"1"], [b"2"], [b"3"], [b"4"], [b"5"]):
            wait_until(lambda names=names: scene.script.count() == len(names))
            assert scene.script.names == [names]
            if names == [b"0", b"1"]:
                (connection,) = scene.script.held
                scene.script.held.clear()
                connection.send(HTTP.wrap(b"0") + b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
            else:
                scene.script.release()
        assert HTTP.payload(HTTP.read(clients[0])) == b"0"
        for client, name in zip(clients[2:], (b"2", b"3", b"4", b"5"), strict=True):
            assert HTTP.payload(HTTP.read(client)) == name


@pytest.mark.parametrize("end", [close, reset])
def test_pipeline_http_requests_without_answer_go_again_in_order_when_the_connection_closes(end):
    with Scene(HTTP, pipeline="8") as scene:
        scene.warm()
        scene.hold()
        clients = scene.ask_all(*(get(b"%d" % number) for number in range(4)))
        wait_until(lambda: scene.script.count() == 4)
        (connection,) = scene.script.held
        scene.script.held.clear()
        connection.send(HTTP.wrap(b"0"))
        assert HTTP.payload(HTTP.read(clients[0])) == b"0"
        scene.script.is_free = True
        end(connection, b"")
        assert [HTTP.payload(HTTP.read(client)) for client in clients[1:]] == [b"1", b"2", b"3"]
        assert scene.script.log == [b"0", b"1", b"2", b"3", b"1", b"2", b"3"]


def test_pipeline_http_answer_that_ends_the_connection_sends_the_rest_again():
    with Scene(HTTP, pipeline="8") as scene:
        scene.warm()
        scene.hold()
        clients = scene.ask_all(*(get(b"%d" % number) for number in range(3)))
        wait_until(lambda: scene.script.count() == 3)
        (connection,) = scene.script.held
        scene.script.held.clear()
        scene.script.is_free = True
        connection.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\n0")
        assert [HTTP.payload(HTTP.read(client)) for client in clients] == [b"0", b"1", b"2"]
        assert scene.script.log == [b"0", b"1", b"2", b"1", b"2"]


def test_pipeline_http_answer_that_is_none_fails_its_own_request_alone():
    with Scene(HTTP, pipeline="8") as scene:
        scene.warm()
        scene.hold()
        clients = scene.ask_all(*(get(b"%d" % number) for number in range(3)))
        wait_until(lambda: scene.script.count() == 3)
        scene.script.is_free = True
        scene.script.release(garbage)
        assert status(clients[0]) == b"502"
        assert [HTTP.payload(HTTP.read(client)) for client in clients[1:]] == [b"1", b"2"]


def test_pipeline_http_request_that_kills_the_target_is_repeated_once_and_harms_nobody_else():
    """It is the first in flight in the end, and is told so; all others are answered."""

    def behaviour(connection, request):
        return (close,) if b"/poison" in request else (answer,)

    with ExitStack() as stack:
        target = stack.enter_context(Target(behaviour, HTTP))
        service = stack.enter_context(serving(target, pipeline="8"))
        clients = [stack.enter_context(Client(service.address, HTTP)) for _ in range(12)]
        warm(service, *clients[:2])
        for number, client in enumerate(clients):
            client.send_raw(get(b"poison" if number == 5 else b"%d" % number))
        for number, client in enumerate(clients):
            told = HTTP.read(client)
            if number == 5:
                assert told[9:12] == b"502"
            else:
                assert HTTP.payload(told) == b"%d" % number


def test_pipeline_http_body_too_large_for_one_piece_has_the_connection_for_itself():
    body = b"x" * 200_000

    def behaviour(connection, request):
        return (answer,)

    with ExitStack() as stack:
        target = stack.enter_context(Target(behaviour, HTTP))
        service = stack.enter_context(serving(target, pipeline="8"))
        clients = [stack.enter_context(Client(service.address, HTTP)) for _ in range(9)]
        warm(service, *clients[:2])
        for number, client in enumerate(clients):
            if number % 3:
                client.send_raw(get(b"%d" % number))
            else:
                head = b"PUT /%d HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (number, len(body))
                client.send_raw(head + body)
        for number, client in enumerate(clients):
            assert HTTP.payload(HTTP.read(client)) == b"%d" % number
        assert target.peak == 1


def test_pipeline_http_answer_before_the_whole_body_is_delivered_and_ends_the_connection():
    """A 413 was a 502: the request was taken for one that had not been sent."""
    size = 8_000_000

    def read(stream):
        head = stream.until(b"\r\n\r\n")
        if head.startswith(b"POST "):
            stream.exactly(200_000)
            stream.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
            stream.target.released.wait()
        return head

    framing = Framing("http", read, HTTP.wrap, HTTP.payload)
    with Target(framing=framing) as target, serving(target, pipeline="4") as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            assert HTTP.read(client).startswith(b"HTTP/1.1 413 ")
            client.send_raw(get(b"next"))
            assert HTTP.payload(HTTP.read(client)) == b"next"
        assert target.accepted == 2


def stream(connection):
    """The beginning of an answer without end."""
    connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")


def test_pipeline_http_puts_nothing_behind_an_answer_that_has_begun():
    with Scene(HTTP, pipeline="8", queue_timeout="200ms") as scene:
        scene.warm()
        scene.hold()
        scene.ask_all(get(b"stream"))
        wait_until(lambda: scene.script.count() == 1)
        (connection,) = scene.script.held
        stream(connection)
        wait_until(lambda: any(upstream._in_flight[0].answered for upstream in scene.service.pool._upstreams))
        (late,) = scene.ask_all(get(b"late"))
        assert status(late) == b"503"
        assert scene.script.names == [[b"stream"]]


def test_pipeline_http_request_behind_an_answer_without_end_is_told_in_time_and_its_late_answer_dropped():
    with Scene(HTTP, pipeline="8", timeout="400ms") as scene:
        scene.warm()
        scene.hold()
        _, waiting = scene.ask_all(get(b"stream"), get(b"waiting"))
        wait_until(lambda: scene.script.count() == 2)
        (connection,) = scene.script.held
        stream(connection)

        def go_on() -> None:
            connection.send(b"1\r\nx\r\n")
            gevent.sleep(0.05)

        ticker = gevent.spawn(lambda: [go_on() for _ in range(12)])
        assert status(waiting) == b"504"
        ticker.join()
        connection.send(b"0\r\n\r\n" + HTTP.wrap(b"waiting"))
        scene.script.held.clear()
        scene.script.is_free = True
        with Client(scene.service.address, HTTP) as client:
            assert ask(client, b"next") == b"next"
        assert scene.target.accepted == 1
        assert scene.script.log == [b"stream", b"waiting", b"next"]


def test_pipeline_http_answer_without_end_whose_client_left_while_it_waited_its_turn_ends():
    with Scene(HTTP, pipeline="8", timeout="20s") as scene:
        scene.warm()
        scene.hold()
        slow, gone, victim = scene.ask_all(get(b"slow"), get(b"gone"), get(b"victim"))
        wait_until(lambda: scene.script.count() == 3)
        (connection,) = scene.script.held
        scene.script.held.clear()
        gone.vanish("reset")
        gevent.sleep(0.3)
        scene.script.is_free = True
        connection.send(HTTP.wrap(b"slow"))
        assert HTTP.payload(HTTP.read(slow)) == b"slow"
        with suppress(Closed):  # it may be over by now
            stream(connection)
        assert HTTP.payload(HTTP.read(victim)) == b"victim"
        assert scene.script.log == [b"slow", b"gone", b"victim", b"victim"]
