"""The deadline and the watch over the loop that the tests of the invariants have, but longer: programs start here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

import gevent
import pytest

from tests.peers.support import Answers, Pair, start
from tests.support.service import failing_on_errors

T = TypeVar("T")

DEADLINE = 55.0


def once(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, run once for the same words; an error is raised again, or all tests would wait for it in turn."""
    results: dict[tuple[str, ...], T | Exception] = {}

    def call(*words: str) -> T:
        if words not in results:
            try:
                results[words] = function(*words)
            except Exception as error:
                results[words] = error
        result = results[words]
        if isinstance(result, Exception):
            raise result
        return result

    return call


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with failing_on_errors(), gevent.Timeout(DEADLINE):
        yield


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """A function: the pair of a target by its name, started once for all tests, which leave an idle connection each."""
    with ExitStack() as stack:
        yield once(lambda name: stack.enter_context(start(name, tmp_path_factory.mktemp("pair"))))


@pytest.fixture
def pair(request: pytest.FixtureRequest, started: Callable[[str], Pair]) -> Pair:
    return started(request.param)


@pytest.fixture(scope="session")
def asked(started: Callable[[str], Pair]) -> Callable[[str, str], Answers]:
    """A function: what a client got, by the names of target and client; it runs once."""
    return once(lambda target, client: Answers(client, started(target)))
