"""Deadlines on a clock that the test turns: order, expiry, and no timer too many."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import gevent
import pytest
from gevent.event import Event
from hypothesis import given
from hypothesis import strategies as st

from gmux import deadlines
from gmux.deadlines import Deadlines

SECONDS = 10


class Timer:
    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock = clock
        self.due = clock.now + seconds

    def start(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.clock.timers.append(self)

    def stop(self) -> None:
        if self in self.clock.timers:
            self.clock.timers.remove(self)

    close = stop


class Clock:
    """Stands for the loop and for `monotonic`; whole seconds, so that nothing is rounded."""

    def __init__(self) -> None:
        self.now = 1000
        self.timers: list[Timer] = []
        self.hub = SimpleNamespace(
            loop=SimpleNamespace(timer=lambda seconds, priority: Timer(self, seconds), MINPRI=-2)
        )

    def advance(self, seconds: int) -> None:
        end = self.now + seconds
        while due := [t for t in self.timers if t.due <= end]:
            timer = min(due, key=lambda t: t.due)
            self.timers.remove(timer)
            self.now = max(self.now, timer.due)
            timer.callback()
        self.now = end


@pytest.fixture
def clock(monkeypatch):
    return install(Clock(), monkeypatch)


def install(clock: Clock, monkeypatch) -> Clock:
    monkeypatch.setattr(deadlines, "monotonic", lambda: clock.now)
    monkeypatch.setattr(deadlines, "get_hub", lambda: clock.hub)
    return clock


def test_things_expire_in_their_order_each_at_its_time(clock):
    expired = []
    queue = Deadlines(SECONDS, lambda thing: expired.append((thing, clock.now)))
    start = clock.now
    queue.add("a")
    clock.advance(3)
    queue.add("b")
    queue.add("c")
    clock.advance(6)
    assert expired == []
    clock.advance(100)
    assert expired == [("a", start + 10), ("b", start + 13), ("c", start + 13)]
    assert len(queue) == 0
    assert clock.timers == []


def test_thing_that_is_expired_is_no_longer_held_when_it_is_told(clock):
    held = []
    queue = Deadlines(SECONDS, lambda thing: held.append(thing in queue))
    queue.add("a")
    clock.advance(SECONDS)
    assert held == [False]


def test_thing_discarded_does_not_expire(clock):
    expired = []
    queue = Deadlines(SECONDS, expired.append)
    queue.add("a")
    queue.add("b")
    queue.discard("a")
    queue.discard("never added")
    clock.advance(SECONDS)
    assert expired == ["b"]


def test_thing_added_again_starts_anew_and_stands_last(clock):
    expired = []
    queue = Deadlines(SECONDS, lambda thing: expired.append((thing, clock.now - start)))
    start = clock.now
    queue.add("a")
    queue.add("b")
    clock.advance(4)
    queue.add("a")
    assert len(queue) == 2
    clock.advance(100)
    assert expired == [("b", 10), ("a", 14)]


def test_pop_first_gives_things_in_their_order_then_raises(clock):
    queue = Deadlines(SECONDS, pytest.fail)
    for thing in "abc":
        queue.add(thing)
    queue.add("a")
    assert [queue.pop_first() for _ in range(3)] == ["b", "c", "a"]
    with pytest.raises(KeyError):
        queue.pop_first()
    clock.advance(100)


def test_thing_added_first_stands_at_the_head_with_the_deadline_of_the_head(clock):
    expired = []
    queue = Deadlines(SECONDS, lambda thing: expired.append((thing, clock.now - start)))
    start = clock.now
    queue.add("a")
    clock.advance(4)
    queue.add_first("b")
    assert queue.pop_first() == "b"
    queue.add_first("b")
    clock.advance(100)
    assert expired == [("b", 10), ("a", 10)]


def test_thing_added_first_to_nothing_gets_the_whole_time(clock):
    expired = []
    queue = Deadlines(SECONDS, expired.append)
    queue.add_first("a")
    clock.advance(SECONDS - 1)
    assert expired == []
    clock.advance(1)
    assert expired == ["a"]


def test_seconds_of_zero_expire_nothing_and_need_no_timer(clock):
    queue = Deadlines(0, pytest.fail)
    queue.add("a")
    queue.add_first("b")
    assert clock.timers == []
    clock.advance(10**9)
    assert list(queue) == ["b", "a"]


def test_emptied_queue_that_is_used_again_expires_again(clock):
    expired = []
    queue = Deadlines(SECONDS, lambda thing: expired.append((thing, clock.now - start)))
    start = clock.now
    queue.add("a")
    clock.advance(4)
    queue.pop_first()
    queue.add("b")
    clock.advance(100)
    assert expired == [("b", 14)]


def test_timer_that_fires_early_waits_for_the_rest(clock):
    # libev counts from the time at which its loop last woke, so a timer may be early.
    expired = []
    queue = Deadlines(SECONDS, expired.append)
    queue.add("a")
    clock.timers[0].due -= 2
    clock.advance(SECONDS - 1)
    assert expired == []
    clock.advance(1)
    assert expired == ["a"]


def test_many_things_need_one_timer(clock):
    queue = Deadlines(SECONDS, lambda _: None)
    for thing in range(100):
        queue.add(thing)
        assert len(clock.timers) == 1
        clock.advance(1)
    assert len(queue) == SECONDS - 1


def test_things_added_while_others_expire_need_no_second_timer(clock):
    queue = Deadlines(SECONDS, lambda thing: queue.add(thing))
    for thing in "abc":
        queue.add(thing)
        clock.advance(1)
    for _ in range(5):
        clock.advance(SECONDS)
        assert len(clock.timers) == 1
    assert len(queue) == 3


def test_queue_emptied_while_things_expire_tells_no_more(clock):
    expired = []

    def empty(thing: str) -> None:
        expired.append(thing)
        queue.pop_first()

    queue = Deadlines(SECONDS, empty)
    queue.add("a")
    queue.add("b")
    clock.advance(100)
    assert expired == ["a"]
    assert clock.timers == []


def test_thing_discarded_while_another_expires_is_not_told(clock):
    expired = []

    def take_along(thing: str) -> None:
        expired.append(thing)
        queue.discard("b")

    queue = Deadlines(SECONDS, take_along)
    for thing in "abc":
        queue.add(thing)
    clock.advance(100)
    assert expired == ["a", "c"]


def test_error_while_one_thing_expires_does_not_keep_the_others_for_ever(clock):
    expired = []

    def fail_once(thing: str) -> None:
        expired.append(thing)
        if thing == "a":
            raise ValueError

    queue = Deadlines(SECONDS, fail_once)
    queue.add("a")
    queue.add("b")
    # The loop reports what a callback raises, and goes on.
    with pytest.raises(ValueError):  # noqa: PT011
        clock.advance(SECONDS)
    clock.advance(100)
    assert expired == ["a", "b"]


def test_queues_are_equal_only_to_themselves():
    # They are dictionaries underneath, and two empty ones would be equal.
    one, other = Deadlines(SECONDS, print), Deadlines(SECONDS, print)
    assert one != other
    assert len({one, other}) == 2


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "add_first", "discard"]), st.integers(0, 4)),
        st.tuples(st.just("advance"), st.integers(0, 12)),
        st.tuples(st.just("pop_first"), st.none()),
    ),
    max_size=40,
)


@given(OPERATIONS)
def test_any_operations_expire_what_a_simple_model_expires(operations):
    clock, expired = Clock(), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(clock, monkeypatch)
        queue = Deadlines(SECONDS, lambda thing: expired.append((thing, clock.now)))
        model: list[tuple[int, int]] = []  # things with their deadlines, in order
        due: list[tuple[int, int]] = []
        for operation, argument in operations:
            if operation == "advance":
                clock.advance(argument)
                due += [entry for entry in model if entry[1] <= clock.now]
                model = [entry for entry in model if entry[1] > clock.now]
            elif operation == "pop_first":
                if model:
                    assert queue.pop_first() == model.pop(0)[0]
            else:
                getattr(queue, operation)(argument)
                head = model[0][1] if model else clock.now + SECONDS
                model = [entry for entry in model if entry[0] != argument]
                if operation == "add":
                    model.append((argument, clock.now + SECONDS))
                elif operation == "add_first":
                    model.insert(0, (argument, head))
            assert expired == due
            assert len(queue) == len(model)
            assert len(clock.timers) <= 1
        assert list(queue) == [thing for thing, _ in model]


def test_real_loop_calls_expired():
    told = Event()
    queue = Deadlines(0.01, lambda _: told.set())
    queue.add("a")
    with gevent.Timeout(30):
        told.wait()
    assert "a" not in queue


def test_thing_added_first_since_long_ago_expires_sooner_than_all_others(clock):
    expired = []
    queue = Deadlines(SECONDS, lambda thing: expired.append((thing, clock.now - start)))
    start = clock.now
    clock.advance(4)
    queue.add("a")
    queue.add_first("b", start)
    queue.add_first("c", start + 50)
    assert len(clock.timers) == 1
    clock.advance(100)
    assert expired == [("c", 10), ("b", 10), ("a", 14)]


def test_many_things_that_are_due_leave_the_loop_its_turns(clock):
    turns = []

    def work(thing: int) -> None:
        clock.now += 1
        turns.append(clock.turn)

    clock.turn = 0
    queue = Deadlines(SECONDS, work)
    for thing in range(3):
        queue.add(thing)
    (timer,) = clock.timers
    clock.now += SECONDS
    while clock.timers:
        (timer,) = clock.timers
        timer.stop()
        timer.callback()
        clock.turn += 1
    assert turns == [0, 1, 2]
