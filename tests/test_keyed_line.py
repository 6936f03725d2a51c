"""The line by key against a plain list that is walked over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from gmux.codecs.base import KeyedRequest
from gmux.exchange import Exchange
from gmux.keyed_line import SPARE_GROUPS, KeyedLine

CONNECTIONS = "AB"

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "add_first"]), st.integers(0, 4)),
        st.tuples(st.sampled_from(["take", "release"]), st.sampled_from(CONNECTIONS)),
        st.tuples(st.just("discard"), st.integers(0, 20)),
        st.tuples(st.sampled_from(["pop_first", "tidy"]), st.none()),
    ),
    max_size=80,
)


class Asker:
    name = "asker"

    def deliver(self, exchange, part):
        raise AssertionError

    fail = deliver


def waiting_for(key: Hashable) -> Exchange:
    return Exchange(Asker(), KeyedRequest(b"", key=key))


def key_of(exchange: Exchange) -> Hashable:
    return exchange.request.key


@given(OPERATIONS)
def test_any_operations_give_what_a_walk_over_a_list_gives(operations):
    line = KeyedLine(0, lambda exchange: None)
    model: list[Exchange] = []
    held: dict[str, list[Hashable]] = defaultdict(list)
    for operation, argument in operations:
        if operation == "add":
            model.append(waiting_for(argument))
            line.add(model[-1])
        elif operation == "add_first":
            model.insert(0, waiting_for(argument))
            line.add_first(model[0])
        elif operation == "discard" and model:
            line.discard(model.pop(argument % len(model)))
        elif operation == "pop_first" and model:
            assert line.pop_first() is model.pop(0)
        elif operation == "tidy":
            line._tidy()
        elif operation == "release" and held[argument]:
            line.released(argument, held[argument].pop(0))
        elif operation == "take":
            keys = held[argument]
            wanted = next((exchange for exchange in model if key_of(exchange) not in keys), None)
            assert line.take(argument, keys.__contains__) is wanted
            if wanted is not None:
                model.remove(wanted)
                keys.append(key_of(wanted))
        assert list(line) == model
        assert all(line.has_key(key) == any(key_of(e) == key for e in model) for key in range(5))


def test_those_that_are_passed_over_are_looked_at_once():
    looked_at = 0

    def holds(key: Hashable) -> bool:
        nonlocal looked_at
        looked_at += 1
        return key < 5000

    line = KeyedLine(0, lambda exchange: None)
    for key in range(5000):
        line.add(waiting_for(key))
    for number in range(1000):
        line.add(waiting_for(5000 + number % 3))
        assert key_of(line.take("A", holds)) == 5000 + number % 3
    assert looked_at < 5000 * 2 + 1000
    assert len(line) == 5000


def test_what_has_left_is_not_kept_behind_one_that_stays():
    line = KeyedLine(0, lambda exchange: None)
    line.add(waiting_for("stays"))
    for number in range(10_000):
        line.add(waiting_for(number))
        line.take("A", {"stays"}.__contains__)
    assert len(line._log) <= 2 + SPARE_GROUPS + 1
    assert len(line._views["A"].again) == 0
