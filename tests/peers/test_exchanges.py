"""Real clients at real servers get the same answers through gmux as without it."""

from __future__ import annotations

import json

import pytest

from tests.peers.exchanges import CLIENTS, TARGETS, exchanges_of
from tests.peers.support import OF_A_REQUEST, OF_AN_ANSWER, Got

ALL = [(target, client, exchange) for target in TARGETS for client in CLIENTS for exchange in exchanges_of(target)]


def comparable(answer: Got, but: set[str]) -> Got:
    """An answer without what differs by design or by nature."""
    return answer | {"fields": [(name, value) for name, value in answer["fields"] if name.lower() not in but]}


def told(answer: Got) -> tuple[int, Got]:
    """What the target says of the request; its length is that of what it says."""
    said = json.loads(answer["text"])
    said["fields"] = [(name, value) for name, value in said["fields"] if name.lower() not in OF_A_REQUEST]
    return answer["status"], said


@pytest.mark.parametrize(
    ("target", "client", "exchange"), ALL, ids=[f"{client} to {target}: {exchange}" for target, client, exchange in ALL]
)
def test_answer_is_the_same_as_without_gmux(target, client, exchange, asked):
    answers = asked(target, client)
    direct, through = answers.direct[exchange.name], answers.through[exchange.name]
    assert "error" not in direct, direct
    assert "error" not in through, through
    assert direct["status"] in exchange.status
    if exchange.path.startswith("/tell"):
        assert told(direct) == told(through)
    else:
        # A file that was put is as old as the run.
        but = OF_AN_ANSWER | ({"etag", "last-modified"} if exchange.path.startswith("/store") else set())
        assert comparable(direct, but) == comparable(through, but)
