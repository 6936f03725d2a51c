"""Turns of the loop in shares: what is ready is served in order, and no route holds a turn for longer than its slice.

libev calls what is ready in one turn backwards, and each call runs for as long as it likes. So the watchers of sockets
only note that they are ready, and the work is done after all of them: for each route its connections to the target
first, then its clients in the order in which they connected or were last served (invariant 7). When the slice of a
route is over, the other routes are served, and what is left waits for the next turn. Work that goes on for long, such
as the messages of one large read, ends after a slice too, and asks for another one with `later`.

A client whose step took long is served later the next time, as if it had been served several times. So a client whose
requests are expensive takes time from the others, but not their turns.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from operator import attrgetter
from time import monotonic
from typing import Any

from gevent import get_hub

READ, WRITE = 1, 2

#: Seconds that a route may work in one turn of the loop while others work too. A request takes 20 to 40 us of gmux and
#: two turns, so with much more than this a route that is flooded leaves the others less than half.
SLICE = 0.00003

#: The same while no other route does anything: the loop still has to come to timers, signals and new clients.
LONE_SLICE = 0.001

#: Seconds after the work of another route for which a route does not count as alone.
LONE_AFTER = 0.05

#: A step of more seconds than the first counts as one more for each of the second, which is what a usual one takes.
LONG_STEP = 0.0002
USUAL_STEP = 0.000025

#: The most of them: who had bad luck, as when the process was stopped meanwhile, is not behind for long.
MAX_STEPS = 400

Step = Callable[[], object]

PLACE = attrgetter("place")


class Task:
    """Something of a route that has work to do, again and again: a client or a connection to the target."""

    __slots__ = ("is_target", "place", "share")

    def __init__(self, share: Share, is_target: bool) -> None:
        self.share = share
        self.is_target = is_target
        #: Among the clients of its route; connections to the target come before them.
        self.place = -1 if is_target else share.next_place()

    def later(self, step: Step) -> None:
        """Call `step` in the next turn of the loop; it cannot be called back. It may switch greenlets."""
        self.share.scheduler.add(self, step)

    def charge(self, seconds: float) -> None:
        """Its last step took so long: a client comes later the next time."""
        if not self.is_target:
            self.place += min(int(seconds / USUAL_STEP), MAX_STEPS)


class Watch(Task):
    """Calls `step`, which may switch greenlets, in the share of its route whenever a descriptor is ready."""

    __slots__ = ("_is_carried", "_is_queued", "_watcher", "is_on", "step")

    def __init__(self, share: Share, descriptor: int, events: int, step: Step, is_target: bool = False) -> None:
        super().__init__(share, is_target)
        self.step = step
        self._watcher: Any = get_hub().loop.io(descriptor, events)
        self.is_on = False
        # Whether it was ready and is to be served; and whether that did not fit into its turn. Then the watcher is off,
        # or it would be ready in each turn until it is served.
        self._is_queued = self._is_carried = False

    def start(self) -> None:
        self.is_on = True
        if not self._is_carried:
            self._watcher.start(self.share.scheduler.ready.append, self)

    def stop(self) -> None:
        self.is_on = False
        self._watcher.stop()

    def close(self) -> None:
        """Call it before the descriptor is closed, whose number may be the next connection's at once."""
        self.stop()
        self._watcher.close()

    def queue(self) -> None:
        self._is_queued = True
        self.share.add(self, self.serve)

    def carry(self) -> None:
        """The turn is over; it is served in a later one, if it was not served yet."""
        if self._is_queued:
            self._is_carried = True
            self._watcher.stop()

    def serve(self) -> None:
        self._is_queued = False
        if self._is_carried:
            self._is_carried = False
            if self.is_on:
                self.start()
        if self.is_on:
            self.step()


class Share:
    """What one route has to do in the turns of the loop."""

    __slots__ = ("_numbers", "clients", "scheduler", "served", "targets")

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        scheduler.shares += 1
        self.targets: deque[tuple[Task, Step]] = deque()
        #: A heap, by place; the number makes each entry different, and the first of a place first.
        self.clients: list[tuple[int, int, Task, Step]] = []
        self._numbers = itertools.count()
        #: Steps of clients so far.
        self.served = 0

    def next_place(self) -> int:
        """The place of who was served last."""
        self.served += 1
        return self.served

    def add(self, task: Task, step: Step) -> None:
        if task.is_target:
            self.targets.append((task, step))
        else:
            heappush(self.clients, (task.place, next(self._numbers), task, step))
        self.scheduler.busy[self] = None


class Scheduler:
    """One for all routes of a process."""

    def __init__(self) -> None:
        #: Watches whose descriptors are ready in this turn.
        self.ready: list[Watch] = []
        #: Shares with work left over, in the order in which they got it.
        self.busy: dict[Share, None] = {}
        #: Seconds that a route may work in a turn.
        self.slice = LONE_SLICE
        # When the step is to end that is under way; 0: it has not asked yet.
        self._until = 0.0
        self.shares = 0
        self._later: list[tuple[Task, Step]] = []
        # Who worked last, and until when others count as working too.
        self._last: Share | None = None
        self._shared_until = 0.0
        loop = get_hub().loop
        # It runs in each turn, after all other events of that turn.
        self._check: Any = loop.check(ref=False, priority=loop.MINPRI)
        self._check.start(self._run)
        # It is on while there is work for the next turn, for which the loop must not sleep.
        self._awake: Any = loop.idle(ref=False)
        self._is_awake = False

    def close(self) -> None:
        for watcher in (self._check, self._awake):
            watcher.stop()
            watcher.close()

    @property
    def is_shared(self) -> bool:
        """Whether several routes have work."""
        return self.slice == SLICE

    def is_step_over(self) -> bool:
        """Whether a step that could go on has had its time, which runs from its first call. It calls `later` then."""
        now = monotonic()
        if not self._until:
            # Half: what it did before it asked, and what it does with the last piece, take about as long.
            self._until = now + self.slice / 2
            return False
        return now > self._until

    def add(self, task: Task, step: Step) -> None:
        """See `Task.later`."""
        self._later.append((task, step))
        self._stay_awake()

    def _run(self) -> None:
        ready = self.ready
        if self._is_awake:
            self._share_out()
        elif len(ready) == 1:
            # Most turns are like this one, and each of them is on the way of a request.
            watch = ready.pop()
            self._meet(watch.share)
            if watch.is_on:
                self._call(watch, watch.step)
        elif ready:
            if self.shares == 1 or len({watch.share for watch in ready}) == 1:
                self._serve_alone()
            else:
                self._share_out()

    def _serve_alone(self) -> None:
        """The same as `_share_out` where all is of one share and nothing is left over: this is on the hot path, too."""
        watches = sorted(self.ready, key=PLACE)
        self.ready.clear()
        self._meet(watches[0].share)
        now = monotonic()
        end = now + self.slice
        for number, watch in enumerate(watches, 1):
            if watch.is_on:
                self._call(watch, watch.step)
            before, now = now, monotonic()
            if now - before > LONG_STEP:
                watch.charge(now - before)
            if now >= end:
                for left in watches[number:]:
                    left.queue()
                    left.carry()
                break
        if self.busy:
            self._stay_awake()

    def _share_out(self) -> None:
        """A turn with work of several shares, or left over from the last one."""
        watches = self.ready.copy()
        self.ready.clear()
        for watch in watches:
            watch.queue()
        later, self._later = self._later, []
        for task, step in later:
            task.share.add(task, step)
        self._serve()
        for watch in watches:
            watch.carry()
        if self.busy or self._later:
            self._stay_awake()
        elif self._is_awake:
            self._is_awake = False
            self._awake.stop()

    def _serve(self) -> None:
        """Give each share that has work one slice; each serves one of its clients at least."""
        now = monotonic()
        if now >= self._shared_until:
            self.slice = LONE_SLICE
        # Those that have just got work come first: the others had a slice in the last turn.
        for share in reversed(tuple(self.busy)):
            self._meet(share)
            end = now + self.slice
            middle = now + self.slice / 2
            targets, clients = share.targets, share.clients
            for _ in range(len(targets)):
                task, step = targets.popleft()
                self._call(task, step)
                now = monotonic()
                if now >= middle:
                    break
            while clients:
                _, _, task, step = heappop(clients)
                before = now
                self._call(task, step)
                now = monotonic()
                if now - before > LONG_STEP:
                    task.charge(now - before)
                if now >= end:
                    break
            if not (targets or clients):
                del self.busy[share]

    def _meet(self, share: Share) -> None:
        """`share` has work now."""
        if share is not self._last:
            if self._last is not None:
                self.slice = SLICE
                self._shared_until = monotonic() + LONE_AFTER
            self._last = share

    def _call(self, task: Task, step: Step) -> None:
        if not task.is_target:
            share = task.share
            share.served += 1
            task.place = share.served
        try:
            step()
        except Exception:
            self._failed(task, step)
        self._until = 0.0

    def _failed(self, task: Task, step: Step) -> None:
        """A fault of gmux. As it would come again at once, what has it is not served any more."""
        if isinstance(task, Watch):
            task.stop()
        get_hub().handle_error(step, *sys.exc_info())

    def _stay_awake(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            self._awake.start(_nothing)


def _nothing() -> None:
    pass
