"""Connections by their load against a plain walk over all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gmux.by_load import ByLoad

DEPTH = 4


class Connection:
    """`held` are the keys that it holds; one that is closed takes nothing."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.is_closed = False
        self.tries = 0

    @property
    def load(self) -> int:
        return len(self.held)

    @property
    def has_place(self) -> bool:
        return self.load < DEPTH and not self.is_closed

    def fits(self, key: int) -> bool:
        self.tries += 1
        return self.has_place and key not in self.held


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("find"), st.integers(0, 5)),
        st.tuples(st.sampled_from(["answer", "close", "begin"]), st.integers(0, 4)),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_any_operations_find_a_connection_with_the_fewest_in_flight(operations):
    by_load = ByLoad(DEPTH, lambda connection: connection.has_place)
    connections = [Connection() for _ in range(5)]
    for operation, argument in operations:
        if operation == "find":
            found = by_load.find(argument)
            able = [c for c in connections if c.load and c.fits(argument)]
            assert (found is None) == (not able)
            if found is not None:
                assert found in able
                assert found.load == min(c.load for c in able)
                found.held.append(argument)
                by_load.put(found)
            continue
        connection = connections[argument]
        if operation == "answer" and connection.held:
            connection.held.pop(0)
            by_load.put(connection)
        elif operation == "close":
            connection.is_closed = True
            by_load.discard(connection)
        elif operation == "begin" and not connection.held:
            connection.held.append(argument)
            by_load.put(connection)


def test_those_that_take_nothing_are_tried_once():
    by_load = ByLoad(DEPTH, lambda connection: connection.has_place)
    connections = [Connection() for _ in range(1000)]
    for connection in connections:
        connection.held.append(0)
        by_load.put(connection)
        connection.is_closed = True
    for _ in range(100):
        assert by_load.find(1) is None
    assert sum(connection.tries for connection in connections) == 1000
