"""What holds for every test here: a deadline in its own greenlet, because pytest-timeout's alarm may hit the loop
instead, and no exception in a callback of the loop, because gevent only prints those.
"""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest

from tests.support.service import failing_on_errors

#: Seconds; less than pytest-timeout's, and much more than any test needs on a busy machine.
DEADLINE = 60.0


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with failing_on_errors(), gevent.Timeout(DEADLINE):
        yield
