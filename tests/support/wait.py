"""Waiting for a state instead of for a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

import gevent

T = TypeVar("T")

#: Seconds that nothing in a test is waited for any longer: no measure of gmux, but of the busiest machine.
PATIENCE = 20.0

#: Seconds between two looks; short, because a test waits for nothing else.
INTERVAL = 0.002


def wait_until(predicate: Callable[[], T], seconds: float = PATIENCE, what: str = "") -> T:
    """The first true value of `predicate()`; fails, and says what it waited for, when none comes in `seconds`."""
    end = monotonic() + seconds
    while not (value := predicate()):
        if monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what or inspect.getsource(predicate).strip()}")
        gevent.sleep(INTERVAL)
    return value
