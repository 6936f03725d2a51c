"""Whatever comes in whatever order, the pool counts right: permits, connections, and one end for each exchange."""

from __future__ import annotations

from collections import deque

import gevent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmux.codecs.base import Part, Request
from gmux.errors import ExchangeError
from gmux.exchange import Exchange
from tests.support.service import serving
from tests.support.target import Target, answer, close, half, never, pause, reset, twice
from tests.support.wait import wait_until

TIMEOUT = 0.01

FAULTS = {
    "never": never,
    "late": (pause(2 * TIMEOUT), answer),
    "half": (half,),
    "half and close": (half, close),
    "twice": (twice,),
    "answer and close": (answer, close),
    "answer and reset": (answer, reset),
    "reset": (reset,),
}
EVENTS = (
    "ask",
    "ask",
    "ask",
    "turn",
    "turn",
    "leave",
    "target closes",
    "target resets",
    "target speaks",
    "time passes",
)
#: What comes between two requests of a connection, or between its making and its first.
PAUSES = ({}, {"request_delay": "2ms"}, {"connect_delay": "2ms"}, {"upstream_max_age": "5ms"})


class Asker:
    """Asks once, and writes down each end it is told."""

    name = "asker"

    def __init__(self, number: int) -> None:
        self.exchange = Exchange(self, Request(b"%d\n" % number))
        self.ends: list[bytes | ExchangeError] = []
        self.is_gone = False

    def deliver(self, exchange: Exchange, part: Part) -> None:
        assert exchange is self.exchange
        if part.last:
            assert part.data == exchange.request.data
            self.ends.append(part.data)

    def fail(self, exchange: Exchange, error: ExchangeError) -> None:
        assert exchange is self.exchange
        self.ends.append(error)


def assert_counts(service, target):
    pool, size = service.pool, service.config.pool_size
    assert service.connected + len(pool._connecting) <= size
    assert pool._permits.counter + service.connected - len(pool._idle) + len(pool._connecting) == size
    assert target.peak <= size


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    events=st.lists(st.one_of(st.sampled_from(EVENTS), st.sampled_from(sorted(FAULTS))), min_size=5, max_size=40),
    size=st.integers(1, 3),
    minimum=st.integers(0, 1),
    pauses=st.sampled_from(PAUSES),
)
def test_pool_any_sequence_of_events_counts_right(events, size, minimum, pauses):
    faults: deque[str] = deque()
    times = {"timeout": f"{TIMEOUT:g}s", "queue_timeout": "50ms", "retry_delay": "1ms"} | pauses
    with (
        Target(lambda connection, request: FAULTS[faults.popleft()] if faults else (answer,)) as target,
        serving(target, pool_size=str(size), pool_min=str(minimum), **times) as service,
    ):
        askers: list[Asker] = []
        for event in events:
            if event == "ask":
                askers.append(Asker(len(askers)))
                service.pool.checkout(askers[-1].exchange)
            elif event == "leave":
                asker = next((asker for asker in askers if not asker.ends and not asker.is_gone), None)
                if asker is not None:
                    asker.is_gone = True
                    service.pool.abandon(asker.exchange)
            elif event == "turn":
                gevent.sleep(0)
            elif event == "time passes":
                gevent.sleep(1.2 * TIMEOUT)
            elif event == "target closes":
                target.close_all()
            elif event == "target resets":
                target.reset_all()
            elif event == "target speaks":
                target.say(b"what nobody asked for\n")
            else:
                faults.append(event)
            assert_counts(service, target)
        staying = [asker for asker in askers if not asker.is_gone]
        wait_until(lambda: all(asker.ends for asker in staying), what="an end for each exchange")
        wait_until(lambda: service.is_whole)
        assert_counts(service, target)
        assert all(len(asker.ends) == 1 for asker in staying)
        assert all(len(asker.ends) <= 1 for asker in askers)
        assert max(target.times().values(), default=1) == 1
