"""Turns of the loop: what is ready is served in order, for a slice, and what is left in the next turns."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from time import perf_counter

import gevent
import pytest

from gmux.scheduler import MAX_STEPS, READ, USUAL_STEP, Scheduler, Share, Task, Watch
from tests.support.wait import wait_until


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler()
    yield scheduler
    scheduler.close()


def work(seconds: float) -> None:
    """Keep the processor busy, and nobody else."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


class Peer:
    """A watched socket with something to read; each step reads it, takes `seconds` and notes its number."""

    def __init__(self, share: Share, stack: ExitStack, number: int, served: list[int], seconds: float = 0.0) -> None:
        self.mine, self.other = (stack.enter_context(sock) for sock in socket.socketpair())
        self.number, self.served, self.seconds = number, served, seconds
        self.watch = Watch(share, self.mine.fileno(), READ, self.step)
        stack.callback(self.watch.close)
        self.watch.start()

    def step(self) -> None:
        self.mine.recv(1)
        self.served.append(self.number)
        work(self.seconds)


def test_what_is_ready_is_served_in_order_also_when_it_takes_many_turns(scheduler):
    served: list[int] = []
    with ExitStack() as stack:
        share = Share(scheduler)
        peers = [Peer(share, stack, number, served, 0.002) for number in range(20)]
        for peer in reversed(peers):
            peer.other.send(b"x")
        wait_until(lambda: len(served) == len(peers))
        assert served == list(range(20))
        gevent.sleep(0.02)
        assert served == list(range(20))


def test_watch_that_is_stopped_in_the_turn_in_which_it_is_ready_is_not_served_until_it_is_started(scheduler):
    served: list[int] = []
    with ExitStack() as stack:
        share = Share(scheduler)
        first, second = (Peer(share, stack, number, served) for number in range(2))
        usual = first.watch.step

        def step() -> None:
            usual()
            second.watch.stop()

        first.watch.step = step
        first.other.send(b"x")
        second.other.send(b"x")
        wait_until(lambda: served)
        gevent.sleep(0.01)
        assert served == [0]
        second.watch.start()
        wait_until(lambda: served == [0, 1])


def test_watch_that_is_closed_while_it_waits_for_a_later_turn_is_not_served(scheduler):
    served: list[int] = []
    with ExitStack() as stack:
        share = Share(scheduler)
        peers = [Peer(share, stack, number, served, 0.002) for number in range(3)]
        for peer in peers:
            peer.other.send(b"x")
        wait_until(lambda: served == [0])
        peers[1].watch.close()
        wait_until(lambda: len(served) == 2)
        gevent.sleep(0.01)
        assert served == [0, 2]


@pytest.mark.parametrize("is_target", [False, True])
def test_work_without_end_of_one_share_leaves_another_its_turns(scheduler, is_target):
    """What is ready is served before the one that never stops has had three more steps."""
    served: list[int] = []
    steps = 0
    is_on = True
    busy = Task(Share(scheduler), is_target)

    def step() -> None:
        nonlocal steps
        steps += 1
        work(0.00005)
        if is_on:
            busy.later(step)

    with ExitStack() as stack:
        peer = Peer(Share(scheduler), stack, 0, served)
        usual = peer.watch.step
        at: list[int] = []

        def note() -> None:
            at.append(steps)
            usual()

        peer.watch.step = note
        busy.later(step)
        wait_until(lambda: steps > 10)
        for number in range(100):
            before = steps
            peer.other.send(b"x")
            wait_until(lambda number=number: len(served) > number)
            assert at[-1] - before <= 3
        is_on = False


@pytest.mark.parametrize("seconds", [0.0, 0.002])
def test_client_whose_steps_take_long_comes_after_those_whose_steps_are_short(scheduler, seconds):
    served: list[int] = []
    with ExitStack() as stack:
        share = Share(scheduler)
        slow = Peer(share, stack, 0, served, seconds)
        quick = [Peer(share, stack, number, served) for number in range(1, 4)]
        for _ in range(2):
            served.clear()
            for peer in (slow, *quick):
                peer.other.send(b"x")
            wait_until(lambda: len(served) == 4)
        assert served == ([1, 2, 3, 0] if seconds else [0, 1, 2, 3])


def test_connection_to_the_target_comes_first_also_when_its_steps_take_long(scheduler):
    served: list[int] = []
    with ExitStack() as stack:
        share = Share(scheduler)
        clients = [Peer(share, stack, number, served) for number in range(1, 4)]
        target = Peer(share, stack, 0, served, 0.0005)
        target.watch.close()
        target.watch = Watch(share, target.mine.fileno(), READ, target.step, is_target=True)
        stack.callback(target.watch.close)
        target.watch.start()
        for _ in range(5):
            served.clear()
            for peer in (*clients, target):
                peer.other.send(b"x")
            wait_until(lambda: len(served) == 4)
            assert served == [0, 1, 2, 3]


def test_client_during_whose_step_the_process_was_stopped_is_not_behind_for_long(scheduler):
    served: list[int] = []
    with ExitStack() as stack:
        share = Share(scheduler)
        unlucky = Peer(share, stack, 0, served, 0.5)
        # More than fits in a slice each, and in each turn.
        others = [Peer(share, stack, number, served, 0.0011) for number in range(1, 4)]
        unlucky.other.send(b"x")
        wait_until(lambda: served)
        unlucky.seconds = 0.0
        for other in others:
            other.other.send(b"x" * 100)
        unlucky.other.send(b"x")
        wait_until(lambda: len(served) == 302)
        assert served[1:].index(0) < MAX_STEPS * USUAL_STEP / 0.0011 * 4


def test_step_that_fails_is_reported_and_not_called_again_and_the_others_are_served(scheduler, monkeypatch):
    served: list[int] = []
    reported: list[object] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *about: reported.append(about[2]))

    def fail() -> None:
        raise ValueError("a fault of gmux")

    with ExitStack() as stack:
        share = Share(scheduler)
        peers = [Peer(share, stack, number, served) for number in range(3)]
        peers[0].watch.step = fail
        for _ in range(2):
            for peer in peers:
                peer.other.send(b"x")
            wait_until(lambda: len(served) >= 2)
        wait_until(lambda: served == [1, 2, 1, 2])
        assert [str(error) for error in reported] == ["a fault of gmux"]
