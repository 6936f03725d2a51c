"""Pools of one budget share its slots: who gets one, what goes with it, and that there is never one too many."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

import gevent
import iso8583
import pytest
from gevent import socket
from gevent.event import Event
from gevent.lock import Semaphore
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from iso8583.specs import default_ascii

from gmux import net
from gmux.folder import Folder
from gmux.mailbox import FORM
from gmux.net import RESET_PATIENCE
from gmux.sharing import KEEP_INTERVAL, SLICE, SharedSlots
from gmux.slot_files import Process
from gmux.slots import Ask, Grant, Slot, State
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client, tagged
from tests.support.framing import MPU
from tests.support.service import serving
from tests.support.target import Target, answer, hold
from tests.support.wait import wait_until

LOG = logging.getLogger("gmux")
TARGET = "10.0.0.1:8583"


class Borrower:
    """A pool as the keeper of its slots knows it, with connections to nowhere."""

    def __init__(self, folder: Path, size: int = 1, kind: str = "kind") -> None:
        self.folder = Folder(folder)
        self.slots = SharedSlots(self.folder, TARGET, size, kind, LOG)
        self.idle: list[Grant] = []
        self.requests = 0
        self.kept = 0
        self.state = State.IDLE
        self.lends = True
        self.taken_over = 0
        self.jobs: list[gevent.Greenlet] = []
        self.slots.open(self)

    def wanted(self) -> int:
        return max(self.requests, self.kept - len(self.idle))

    def need(self) -> int:
        return self.requests

    def lend(self) -> None:
        while self.lends and self.idle and (ask := self.slots.next_ask(self.state)):
            grant = self.idle[0]
            assert grant.sock is not None
            self.slots.met(ask)
            is_kin = self.slots.is_kin(ask)
            if not self.slots.give(ask, grant.slot, grant.sock if is_kin else None, grant.used):
                return
            grant.sock.close()
            del self.idle[0]

    def adopt(self, grant: Grant) -> bool:
        self.taken_over += grant.sock is not None
        # What another made stands for a connection, and so does what is made here.
        sock = grant.sock or socket.socket()
        self.idle.append(Grant(grant.slot, sock, grant.used + 1))
        return True

    def leads_to_target(self, sock: socket.socket) -> bool:
        return sock.proto == socket.IPPROTO_TCP

    def revoke(self, slot: Slot) -> None:
        for grant in self.idle:
            if grant.slot is slot:
                self.idle.remove(grant)
                grant.give_back()
                return

    def ask(self, requests: int = 1) -> None:
        """So many requests wait that are answered as soon as there is a connection for each."""
        self.requests += requests
        for _ in range(requests):
            self.jobs.append(gevent.spawn(self._get))
        self.slots.hurry()

    def _get(self) -> None:
        grant = self.slots.acquire()
        if grant is not None:
            self.requests = max(0, self.requests - 1)
            self.adopt(grant)

    def drop(self) -> None:
        """An idle connection ends."""
        grant = self.idle.pop()
        assert grant.sock is not None
        grant.sock.close()
        grant.slot.release()

    def stop(self) -> None:
        self.slots.close()
        gevent.killall(self.jobs)
        while self.idle:
            self.drop()
        self.folder.close()


def locked(folder: Path) -> int:
    """The slots that are held, by whomever."""
    total = 0
    for path in folder.glob("*.[0-9]*"):
        if f".{FORM}." in path.name:
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            total += 1
        finally:
            os.close(descriptor)
    return total


@pytest.fixture
def borrowers(tmp_path):
    """A function that makes a borrower; all are stopped at the end, and nothing may be left of them."""
    made = []

    def make(size: int = 1, kind: str = "kind") -> Borrower:
        made.append(Borrower(tmp_path, size, kind))
        return made[-1]

    yield make
    for borrower in made:
        borrower.stop()
    assert list(tmp_path.iterdir()) == []


def holding(borrower: Borrower, number: int = 1) -> Borrower:
    borrower.ask(number)
    wait_until(lambda: len(borrower.idle) == number)
    return borrower


def test_idle_connection_goes_to_who_has_none(borrowers):
    first, second = holding(borrowers()), borrowers()
    connection = first.idle[0].sock
    inode = os.fstat(connection.fileno()).st_ino
    holding(second)
    assert not first.idle
    assert os.fstat(second.idle[0].sock.fileno()).st_ino == inode
    assert second.idle[0].used == 2
    assert (len(first.slots._files), len(second.slots._files)) == (0, 1)


def test_connection_of_another_kind_is_closed_and_its_slot_used(borrowers):
    first, second = holding(borrowers()), borrowers(kind="other")
    holding(second)
    assert not first.idle
    assert second.taken_over == 0


def test_busy_pool_gives_to_one_that_holds_fewer_until_they_are_even(borrowers, monkeypatch):
    monkeypatch.setattr("gmux.sharing.SLICE", 3600)
    first, second = holding(borrowers(4), 4), borrowers(4)
    first.state = State.BUSY
    second.ask(4)
    wait_until(lambda: len(second.idle) == 2)
    gevent.sleep(0.1)  # five more asks
    assert (len(first.idle), len(second.idle)) == (2, 2)


def test_busy_pool_keeps_its_last_connection_for_its_slice_then_gives_it(borrowers):
    first, second = holding(borrowers()), borrowers()
    first.state = State.BUSY
    first.slots._since = begin = monotonic()
    holding(second)
    assert monotonic() - begin >= SLICE


def test_pool_that_only_wants_to_keep_a_connection_gets_none_of_another_but_when_that_drains(borrowers):
    first, second = holding(borrowers()), borrowers()
    second.kept = 1
    second.jobs.append(gevent.spawn(second._get))
    wait_until(first.slots.has_asks)
    assert first.idle and not second.idle
    first.state = State.DRAINING
    first.lend()
    wait_until(lambda: second.idle)
    assert not first.idle


def test_request_that_comes_while_a_connection_is_to_be_kept_hurries(borrowers):
    first, second = holding(borrowers()), borrowers()
    second.kept = 1
    second.jobs.append(gevent.spawn(second._get))
    wait_until(first.slots.has_asks)
    with gevent.Timeout(KEEP_INTERVAL / 2):
        second.requests = 1
        second.slots.hurry()
        while not second.idle:
            gevent.sleep(0.001)


def test_connection_that_is_not_wanted_any_more_is_not_waited_for(borrowers):
    first, second = holding(borrowers()), borrowers()
    first.lends = False
    second.ask()
    wait_until(first.slots.has_asks)
    second.requests = 0
    wait_until(lambda: second.jobs[0].ready())
    assert second.jobs[0].successful() and not second.idle


def test_waiting_for_a_slot_names_the_process_that_holds_it(borrowers, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    first, second = holding(borrowers()), borrowers()
    first.lends = False
    second.ask()
    said = f"waiting for a connection to the target held by another gmux, process {os.getpid()}"
    wait_until(lambda: said in caplog.messages)
    first.drop()
    wait_until(lambda: second.idle)
    assert caplog.messages.count(said) == 1


def test_waiter_that_is_killed_with_its_grant_on_the_way_gives_it_back(borrowers):
    first, second = holding(borrowers()), borrowers()
    second.ask()
    wait_until(lambda: not first.idle)  # handed over in this turn of the loop
    gevent.killall(second.jobs)
    wait_until(lambda: len(second.slots._files) == len(second.idle))
    third = borrowers()
    holding(third)


def test_message_of_another_form_is_ignored(borrowers):
    first, second = holding(borrowers()), borrowers()
    reader, writer = os.pipe()
    for message in ({}, {"ask": 1}, {"slot": "x", "used": 1}, {"ask": "x", "held": "many", "need": 1, "valid": "now"}):
        first.slots._mailbox.send(second.slots._mailbox.name, message, [writer])
    os.close(writer)
    os.set_blocking(reader, False)

    def is_closed() -> bool:
        try:
            return os.read(reader, 1) == b""
        except BlockingIOError:
            return False

    wait_until(is_closed, what="the end of the pipe: whoever got its other end has closed it")
    os.close(reader)
    holding(second)


def test_slot_on_its_way_names_who_gets_it(borrowers):
    """Should that one die with it unread, the next to take the slot waits for it to be gone."""
    first, second = holding(borrowers()), borrowers()
    grant = first.idle.pop()
    asker = str(Process(os.getppid()))
    path = grant.slot.path
    assert first.slots.give(Ask("no-such-mailbox", 0, 1, "", asker), grant.slot) is False
    assert path.read_text() == f"{Process.this()}\n"
    assert first.slots.give(Ask(second.slots._mailbox.name, 0, 1, "", asker), grant.slot, grant.sock)
    assert path.read_text() == f"{asker}\n"
    grant.sock.close()
    wait_until(lambda: second.idle)
    assert path.read_text() == f"{Process.this()}\n"


def test_ask_says_which_process_it_is_from(borrowers):
    first, second = holding(borrowers()), borrowers()
    first.lends = False
    second.ask()
    wait_until(first.slots.has_asks)
    ((ask, _),) = first.slots._asks.values()
    assert ask.process == str(Process.this())
    first.drop()
    wait_until(lambda: second.idle)


def test_slot_of_a_process_that_dies_is_had_soon_though_only_a_connection_is_to_be_kept(borrowers, monkeypatch):
    monkeypatch.setattr("gmux.sharing.KEEP_INTERVAL", 3600)
    borrower = borrowers()
    next(iter(borrower.slots._files._paths)).write_text(str(Process(os.getppid())))
    borrower.kept = 1
    borrower.jobs.append(gevent.spawn(borrower._get))
    gevent.sleep(0)
    assert not borrower.idle
    wait_until(lambda: borrower.idle)


@pytest.mark.parametrize("kind", ["kind", "other"])
def test_grant_given_back_its_slot_is_free_when_the_target_had_time_to_see_the_reset(borrowers, kind):
    first, second = holding(borrowers()), borrowers(kind=kind)
    grant = first.idle.pop()
    begin = monotonic()
    grant.give_back()
    holding(second)
    assert monotonic() - begin >= RESET_PATIENCE
    assert second.taken_over == 0


# With pools that are real.


@contextmanager
def sharing(folder: Path, target: Target, *pools: dict[str, str]):
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                serving(
                    target,
                    SharedSlots(Folder(folder), "target", int(pool.get("pool_size", "1")), pool.pop("kind", ""), LOG),
                    **{"pool_min": "0"} | pool,
                )
            )
            for pool in pools
        ]


def ask_all(services, answers: int) -> None:
    """Two clients of each ask all the time, until each has got so many answers."""
    answered = [0] * 2 * len(services)

    def run(number):
        with Client(services[number % len(services)].address) as client:
            while min(answered) < answers:
                payload = tagged(number, answered[number])
                assert client.ask(payload) == payload
                answered[number] += 1

    gevent.joinall([gevent.spawn(run, number) for number in range(len(answered))], raise_error=True)


def test_descriptor_of_a_connection_is_above_that_of_its_slot(tmp_path):
    """The kernel closes those of a dying process from the highest down."""
    with Target(limit=1) as target, sharing(tmp_path, target, {}, {}) as services:
        acquire = services[0].slots.acquire

        def acquire_above_a_hole() -> Grant | None:
            # A client that leaves while the connection is made: its number is the next to be used.
            client = os.open(os.devnull, os.O_RDONLY)
            try:
                return acquire()
            finally:
                os.close(client)

        services[0].slots.acquire = acquire_above_a_hole
        for number in range(6):
            service = services[number % 2]
            with Client(service.address) as client:
                assert client.ask(b"request") == b"request"
            ((upstream, slot),) = service.pool._upstreams.items()
            assert upstream.sock.fileno() > slot.descriptor
        assert target.accepted == 1


@pytest.mark.parametrize(
    "settings",
    [{"upstream_max_age": "1h"}, {"connect_delay": "80ms"}, {"upstream_max_age": "1h", "connect_delay": "80ms"}],
)
def test_connections_that_take_long_to_come_still_serve_both(tmp_path, settings):
    """Longer than a slice: to give them away before their first request would be to serve nobody."""
    with Target(limit=1) as target, sharing(tmp_path, target, dict(settings), dict(settings)) as services:
        ask_all(services, 5)
        assert target.refused == 0


def test_kinds_that_differ_close_the_connection_and_serve_both(tmp_path):
    with Target(limit=1) as target, sharing(tmp_path, target, {"kind": "a"}, {"kind": "b"}) as services:
        ask_all(services, 5)
        assert target.refused == 0


def test_pool_that_is_smaller_after_a_reload_takes_no_more_than_its_size(tmp_path):
    """Both old workers may give, each one connection, to the ask of the new one."""
    old = {"pool_size": "2", "pool_min": "1"}
    gate = Semaphore(0)
    with ExitStack() as stack:
        target = stack.enter_context(Target((hold(gate), answer)))
        first, second, new = stack.enter_context(sharing(tmp_path, target, dict(old), dict(old), {"pool_size": "1"}))
        first.wait_ready()
        second.wait_ready()
        with Client(new.address) as client:
            client.send(b"request")
            wait_until(lambda: target.requests)
            first.route._pool.drain()
            second.route._pool.drain()
            gevent.sleep(0.2)  # ten asks
            assert new.connected == 1
            gate.release()
            assert client.receive() == b"request"
            gate.release()
            assert client.ask(b"again") == b"again"
        assert new.connected == 1


def test_grant_for_which_there_is_no_place_ends_in_good_order_and_costs_no_time(tmp_path, monkeypatch):
    """A connection of a larger pool, from before a reload, comes while the smaller one makes its only one."""
    begun, go_on = Event(), Event()
    connect = net.connect

    def connect_later(address, seconds):
        begun.set()
        go_on.wait()
        return connect(address, seconds)

    monkeypatch.setattr(net, "connect", connect_later)
    with Target() as target, sharing(tmp_path, target, {"pool_min": "1"}) as (service,):
        adopt, tries = service.pool.adopt, []
        monkeypatch.setattr(service.pool, "adopt", lambda grant: tries.append(grant) or adopt(grant))
        begun.wait()
        larger = SharedSlots(Folder(tmp_path), "target", 2, "", LOG)
        sock = socket.create_connection(target.address)
        wait_until(lambda: target.open)
        slot = larger._files.take()
        assert larger.give(Ask(service.slots._mailbox.name, 0, 1, "", ""), slot, sock)
        sock.close()
        wait_until(lambda: target.open == 0)
        assert len(tries) == 2
        wait_until(lambda: len(service.slots._files) == 1)
        go_on.set()
        service.wait_ready()
        larger._mailbox.close()


def test_pool_that_stops_has_released_its_slots(tmp_path):
    with Target() as target, sharing(tmp_path, target, {}) as (service,):
        Grant(service.slots._files.take(), socket.create_connection(target.address)).give_back()
        service.pool.stop()
        assert locked(tmp_path) == 0


def test_connection_that_ends_on_its_way_is_no_sign_of_a_target_that_is_down(tmp_path, monkeypatch):
    with Target() as target, sharing(tmp_path, target, {"pool_min": "1"}, {"retry_delay": "1h"}) as (first, second):
        first.wait_ready()
        take = second.slots._received

        def take_later(message, descriptors):
            if "slot" in message:
                target.reset_all()
                gevent.get_hub().loop.timer(0.05).start(take, message, descriptors)
            else:
                take(message, descriptors)

        second.slots._mailbox._received = take_later
        with Client(second.address) as client:
            assert client.ask(b"request") == b"request"
        assert second.pool._failures == 0


def test_owed_bytes_go_out_before_the_connection_is_anothers(tmp_path):
    """An 0800 of the target right behind an answer: somebody else waits for the connection that the 0810 is owed on."""

    def message(mti: str, number: int, **fields: str) -> bytes:
        encoded, _ = iso8583.encode({"t": mti, "11": f"{number:06}"} | fields, default_ascii)
        return bytes(encoded)

    def answer_and_ask(connection, request):
        fields, _ = iso8583.decode(MPU.payload(request), default_ascii)
        answer = message("0210", int(fields["11"]))
        connection.send(MPU.wrap(answer) + MPU.wrap(message("0800", 999, **{"70": "301"})))

    def behave(connection, request):
        return () if MPU.payload(request).startswith(b"0810") else (answer_and_ask,)

    settings = {"answer_network_management": "true", "pipeline": "4", "key_fields": ["11"]}
    with Target(behave, MPU) as target, sharing(tmp_path, target, dict(settings), dict(settings)) as services:

        def run(number):
            with Client(services[number].address, MPU) as client:
                for n in range(40):
                    assert client.ask(message("0200", 100 * number + n)) == message("0210", 100 * number + n)

        gevent.joinall([gevent.spawn(run, number) for number in range(2)], raise_error=True)
        wait_until(lambda: sum(request.startswith(b"0810") for request in target.requests) == 80)


class Sharing(RuleBasedStateMachine):
    """Any number of pools that come, ask, drop, drain, stop and are killed: the slots held are never too many."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="gmux"))
        self.size = 2
        self.pools: list[Borrower] = []

    @precondition(lambda self: len(self.pools) < 4)
    @rule(kind=st.sampled_from(["a", "b"]))
    def start(self, kind):
        self.pools.append(Borrower(self.folder, self.size, kind))

    @precondition(lambda self: self.pools)
    @rule(data=st.data(), requests=st.integers(1, 3))
    def ask(self, data, requests):
        data.draw(st.sampled_from(self.pools)).ask(requests)

    @precondition(lambda self: self.pools)
    @rule(data=st.data(), state=st.sampled_from(State))
    def turn(self, data, state):
        pool = data.draw(st.sampled_from(self.pools))
        pool.state = state
        pool.lend()

    @precondition(lambda self: self.pools)
    @rule(data=st.data())
    def drop(self, data):
        pool = data.draw(st.sampled_from(self.pools))
        if pool.idle:
            pool.drop()

    @precondition(lambda self: self.pools)
    @rule(data=st.data())
    def stop(self, data):
        pool = data.draw(st.sampled_from(self.pools))
        self.pools.remove(pool)
        pool.stop()

    @precondition(lambda self: self.pools)
    @rule(data=st.data())
    def kill(self, data):
        """All that the kernel does: descriptors are closed, and names stay."""
        pool = data.draw(st.sampled_from(self.pools))
        self.pools.remove(pool)
        for look in list(pool.folder._looks):
            pool.folder.unwatch(look)
        pool.slots._mailbox._watcher.stop()
        pool.slots._mailbox._sock.close()
        pool.lends = False
        gevent.killall(pool.jobs)
        for slot in list(pool.slots._files._held):
            slot.let_go()
        for grant in pool.idle:
            grant.sock.close()

    @rule(turns=st.integers(1, 10))
    def run(self, turns):
        for _ in range(turns):
            gevent.sleep(0)

    @invariant()
    def held_within_budget(self):
        assert locked(self.folder) <= self.size
        names = [slot.path.name for pool in self.pools for slot in pool.slots._files._held]
        assert len(names) == len(set(names)) <= self.size
        assert all(len(pool.slots._files) >= len(pool.idle) for pool in self.pools)

    def teardown(self):
        # Whoever asks last is served, whatever came before.
        for pool in self.pools:
            pool.state = State.DRAINING
            pool.requests = 0
        last = Borrower(self.folder, self.size, "a")
        last.ask(self.size)
        wait_until(lambda: len(last.idle) == self.size, what="all slots for the only one that needs them")
        for pool in [*self.pools, last]:
            pool.stop()
        shutil.rmtree(self.folder)


class TestSharing(Sharing.TestCase):
    settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
