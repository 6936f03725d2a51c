"""Clients of a process that drains go on in another one, and notice nothing."""

from __future__ import annotations

import os
from contextlib import ExitStack

import gevent
import pytest
from gevent import socket
from gevent.lock import Semaphore

from gmux import mailbox, net
from gmux.errors import StartError
from gmux.folder import Folder
from gmux.mailbox import Mailbox, Sent, sweep
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client, tagged
from tests.support.framing import HTTP
from tests.support.service import LOG, Shared, serving
from tests.support.target import Target, answer, hold
from tests.support.wait import wait_until


@pytest.fixture
def shared(tmp_path):
    folder = Folder(tmp_path)
    with net.listen(("127.0.0.1", 0)) as listening:
        yield Shared(listening, folder)
    assert list(tmp_path.iterdir()) == []
    folder.close()


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    yield folder
    folder.close()


class Pair:
    """Two processes of a service, as it were: `drain` ends the old one, and then all is the new one's."""

    def __init__(self, shared: Shared, target: Target, **settings: str) -> None:
        self._life = ExitStack()
        # The old one has all the clients that come before the new one begins.
        self.old = self._life.enter_context(serving(target, shared=shared, **settings))
        self._begin_new = lambda: serving(target, shared=shared, **settings)
        self._rest = ExitStack()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self._life.close()
        self._rest.close()

    def drain(self, seconds: float = 20) -> gevent.Greenlet:
        self.new = self._rest.enter_context(self._begin_new())
        return gevent.spawn(self.old.route.drain, seconds)


def send_get(client: Client, payload: bytes) -> None:
    client.send_raw(b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % payload)


def test_idle_clients_stay_connected(shared):
    with Target() as target, Pair(shared, target) as pair, ExitStack() as stack:
        clients = [stack.enter_context(Client(pair.old.address)) for _ in range(100)]
        for number, client in enumerate(clients):
            assert client.ask(tagged(number, 1)) == tagged(number, 1)
        assert pair.drain().get() is True
        assert len(pair.new.clients) == 100
        for number, client in enumerate(clients):
            assert client.ask(tagged(number, 2)) == tagged(number, 2)


def test_request_sent_at_the_moment_of_the_hand_over_is_answered(shared):
    with Target() as target, Pair(shared, target) as pair, ExitStack() as stack:
        clients = [stack.enter_context(Client(pair.old.address)) for _ in range(20)]
        pair.old.wait_clients(20)
        draining = pair.drain()
        for number, client in enumerate(clients):
            client.send(tagged(number, 1))
            gevent.sleep(0)
        for number, client in enumerate(clients):
            assert client.receive() == tagged(number, 1)
        assert draining.get() is True


def test_request_under_way_is_answered_and_then_its_client_handed_over(shared):
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, Pair(shared, target) as pair, Client(pair.old.address) as client:
        client.send(b"before")
        wait_until(lambda: target.requests)
        draining = pair.drain()
        # What comes now is not read any more by the old one.
        client.pipeline([b"second", b"third"])
        for _ in range(3):
            gate.release()
        assert [client.receive() for _ in range(3)] == [b"before", b"second", b"third"]
        assert draining.get() is True
        assert len(pair.new.clients) == 1


def test_requests_ahead_are_answered_before_their_client_is_handed_over(shared):
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, Pair(shared, target) as pair, Client(pair.old.address) as client:
        client.pipeline([b"first", b"second", b"third"])
        wait_until(lambda: target.requests)
        draining = pair.drain()
        for _ in range(4):
            gate.release()
        assert [client.receive() for _ in range(3)] == [b"first", b"second", b"third"]
        assert draining.get() is True
        assert client.ask(b"fourth") == b"fourth"


def test_half_a_request_is_completed_where_it_was_begun(shared):
    with Target() as target, Pair(shared, target) as pair, Client(pair.old.address) as client:
        client.send_raw(b"half a ")
        wait_until(lambda: any(c.has_request for c in pair.old.clients))
        draining = pair.drain()
        wait_until(lambda: pair.old.route._clients.is_draining)
        client.send_raw(b"request\n")
        assert client.receive() == b"half a request"
        assert draining.get() is True
        assert client.ask(b"next") == b"next"


def test_answer_of_http_does_not_say_close(shared):
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer), HTTP))
        pair = stack.enter_context(Pair(shared, target))
        client = stack.enter_context(Client(pair.old.address, HTTP))
        send_get(client, b"one")
        wait_until(lambda: target.requests)
        draining = pair.drain()
        wait_until(lambda: pair.old.route._clients.is_draining)
        gate.release()
        assert b"close" not in HTTP.read(client).lower()
        assert draining.get() is True
        gate.release()
        send_get(client, b"two")
        assert client.receive() == b"two"


def test_without_a_successor_answer_of_http_says_close_and_the_client_is_closed(shared):
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer), HTTP))
        service = stack.enter_context(serving(target, shared=shared))
        client = stack.enter_context(Client(service.address, HTTP))
        idle = stack.enter_context(Client(service.address, HTTP))
        send_get(client, b"one")
        wait_until(lambda: target.requests)
        draining = gevent.spawn(service.route.drain, 20)
        idle.receive_end()
        gate.release()
        assert b"Connection: close" in HTTP.read(client)
        client.receive_end()
        client.fin()
        idle.fin()
        assert draining.get() is True


def test_client_slow_to_take_its_answer_stays_until_it_has_it(shared):
    size = 3 << 20
    with ExitStack() as stack:
        target = stack.enter_context(Target())
        pair = stack.enter_context(Pair(shared, target))
        client = stack.enter_context(Client(pair.old.address, receive_buffer=4096))
        client.send(b"x" * size)
        wait_until(lambda: pair.old.held)
        draining = pair.drain()
        wait_until(lambda: pair.old.route._clients.is_draining)
        assert not pair.new.clients
        assert client.receive() == b"x" * size
        assert draining.get() is True
        assert client.ask(b"next") == b"next"
        assert len(pair.new.clients) == 1


def test_new_clients_are_the_successors(shared):
    with Target() as target, Pair(shared, target) as pair:
        draining = pair.drain()
        assert draining.get() is True
        with Client(pair.new.address) as client:
            assert client.ask(b"hello") == b"hello"


def test_client_of_another_protocol_is_closed_between_messages(shared):
    """A reload may change what is spoken on a listener."""
    with ExitStack() as stack:
        target, other = stack.enter_context(Target()), stack.enter_context(Target(framing=HTTP))
        old = stack.enter_context(serving(target, shared=shared))
        with Client(old.address) as client:
            assert client.ask(b"one") == b"one"
            stack.enter_context(serving(other, shared=shared))
            assert old.route.drain(20) is True
            client.receive_end()


def test_successor_that_is_gone_clients_are_closed(shared):
    with Target() as target, Pair(shared, target) as pair, Client(pair.old.address) as client:
        assert client.ask(b"one") == b"one"
        gone = Mailbox(shared.folder, pair.old.route._succession._mailbox._subject)
        gone.close_copy()  # as when its process was killed
        draining = gevent.spawn(pair.old.route.drain, 20)
        client.receive_end()
        client.fin()
        assert draining.get() is True


def test_successor_that_is_slow_to_begin_gets_all_clients(shared):
    """Its mailbox is there before it is: what does not fit waits where it is, and is served there."""
    with Target() as target, Pair(shared, target) as pair, ExitStack() as stack:
        clients = [stack.enter_context(Client(pair.old.address)) for _ in range(200)]
        for client in clients:
            client.ask(b"one")
        subject = pair.old.route._succession._mailbox._subject
        slow = Mailbox(shared.folder, subject)
        draining = gevent.spawn(pair.old.route.drain, 20)
        wait_until(lambda: 0 < len(pair.old.clients) < 200)
        taken: list[int] = []
        stayed = next(iter(pair.old.clients))
        assert stayed.is_idle
        slow.open(lambda message, descriptors: taken.extend(descriptors), LOG)
        assert draining.get() is True
        wait_until(lambda: len(taken) == 200)
        slow.close()
        for descriptor in taken:
            os.close(descriptor)
        for client in clients:
            client.receive_end()


def test_clients_beyond_the_limit_of_the_successor_are_refused(shared):
    with ExitStack() as stack:
        target = stack.enter_context(Target())
        old = stack.enter_context(serving(target, shared=shared))
        clients = [stack.enter_context(Client(old.address)) for _ in range(3)]
        old.wait_clients(3)
        stack.enter_context(serving(target, shared=shared, max_clients="2"))
        assert old.route.drain(20) is True
        assert sorted(client.outcome(b"request") for client in clients) == ["answered", "answered", "closed"]


def test_client_that_would_take_a_descriptor_of_the_target_is_closed(shared, caplog):
    with Target() as target, Pair(shared, target) as pair, Client(pair.old.address) as client:
        pair.old.wait_clients(1)
        draining = pair.drain()
        pair.new.route._listener._descriptors._limit = 0
        assert draining.get() is True
        client.receive_end()
        assert "a client that another process handed over is closed: the last descriptors are for" in caplog.text


# The mailbox itself.


def test_message_and_descriptors_arrive(tmp_path, folder):
    got: list = []
    one, two = Mailbox(folder, "subject"), Mailbox(folder, "subject")
    other = Mailbox(folder, "other")
    two.open(lambda message, descriptors: got.append((message, descriptors)), LOG)
    assert one.peers() == [two.name]
    left, right = socket.socketpair()
    assert one.send(two.name, {"a": 1}, [right.fileno()]) is Sent.DONE
    right.close()
    wait_until(lambda: got)
    ((message, (descriptor,)),) = got
    assert message == {"a": 1}
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"x")
    assert left.recv(1) == b"x"
    os.close(descriptor)
    for box in (one, two, other):
        box.close()
    assert list(tmp_path.iterdir()) == []


def test_mailbox_that_is_full_takes_no_more_until_it_is_read(folder):
    one, two = Mailbox(folder, "subject"), Mailbox(folder, "subject")
    sent = 0
    while one.send(two.name, {"n": sent}) is Sent.DONE:
        sent += 1
    got: list[int] = []
    two.open(lambda message, descriptors: got.append(message["n"]), LOG)
    wait_until(lambda: got == list(range(sent)))
    assert one.send(two.name, {"n": sent}) is Sent.DONE
    one.close()
    two.close()


def test_mailbox_of_a_process_that_was_killed_is_removed_by_who_finds_it(tmp_path, folder):
    one, two, three = (Mailbox(folder, "subject") for _ in range(3))
    two.close_copy()
    three.close_copy()
    assert one.send(two.name, {}) is Sent.GONE
    assert one.peers() == [three.name]
    sweep(tmp_path)
    assert one.peers() == []
    assert [path.name for path in tmp_path.iterdir()] == [one.name]
    one.close()
    assert one.send(one.name, {}) is not Sent.DONE


def test_mailbox_that_is_left_has_given_all_that_was_sent(folder):
    one, two = Mailbox(folder, "subject"), Mailbox(folder, "subject")
    got: list = []
    two.open(lambda message, descriptors: got.append(message), LOG)
    assert one.send(two.name, {"n": 1}) is Sent.DONE
    two.leave()
    assert got == [{"n": 1}]
    assert one.peers() == []
    assert one.send(two.name, {"n": 2}) is Sent.GONE
    one.close()
    two.close()


def test_client_that_comes_as_its_new_process_drains_too_is_not_lost(shared):
    with ExitStack() as stack:
        target = stack.enter_context(Target())
        first = stack.enter_context(serving(target, shared=shared))
        with Client(first.address) as client:
            assert client.ask(b"one") == b"one"
            second = stack.enter_context(serving(target, shared=shared))
            third = stack.enter_context(serving(target, shared=shared))
            # The second one alone is there to be found, and has not looked into its mailbox when it drains.
            third.route._succession._mailbox.hide()
            (last,) = first.clients
            first.route._clients.is_draining = True
            assert first.route._succession.hand_over(last._sock) is Sent.DONE
            last.is_handed_over = True
            last._close()
            client.send(b"two")
            assert second.route.drain(20) is True
            assert client.receive() == b"two"
            client.receive_end()
            first.route._clients.is_draining = False


def test_runtime_folder_may_have_a_long_name(tmp_path):
    path = tmp_path / ("x" * 200)
    path.mkdir()
    folder = Folder(path)
    one, two = Mailbox(folder, "subject"), Mailbox(folder, "subject")
    assert one.send(two.name, {}) is Sent.DONE
    one.close()
    two.close()
    folder.close()


def test_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(StartError, match="No such file or directory"):
        Folder(tmp_path / "missing")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd"])
def test_name_that_is_no_name_of_a_mailbox_is_sent_nothing(folder, name):
    one = Mailbox(folder, "subject")
    assert one.send(name, {}) is Sent.GONE
    one.close()


def test_messages_beyond_one_turn_of_the_loop_are_taken_in_the_next(folder, monkeypatch):
    monkeypatch.setattr(mailbox, "MAX_AT_ONCE", 2)
    one, two = Mailbox(folder, "subject"), Mailbox(folder, "subject")
    for n in range(5):
        assert one.send(two.name, {"n": n}) is Sent.DONE
    got: list = []
    two.open(lambda message, descriptors: got.append(message["n"]), LOG)
    wait_until(lambda: got == [0, 1, 2, 3, 4])
    one.close()
    two.close()
