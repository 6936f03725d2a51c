"""Warnings that clients can cause as often as they like: some of them, and the number of the rest."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import gevent

#: Lines of one cause in one PERIOD. A target that is down with thousands of clients would fill a disk otherwise.
MAX_LINES = 20

#: Seconds from the first warning of a cause until its lines are counted anew.
PERIOD = 1.0


class LimitedWarnings:
    """Logs at most MAX_LINES warnings of a cause in each PERIOD, then how many more there were."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._counts: Counter[str] = Counter()

    def __call__(self, cause: str, message: str) -> None:
        """Warn of `message`; never switches greenlets."""
        self._counts[cause] += 1
        count = self._counts[cause]
        if count == 1:
            timer: Any = gevent.get_hub().loop.timer(PERIOD)
            timer.start(self._end_period, cause, timer)
        if count <= MAX_LINES:
            self._log.warning("%s", message)

    def flush(self) -> None:
        """Tell now what was left out, as the service ends."""
        for cause in list(self._counts):
            self._end(cause)

    def _end_period(self, cause: str, timer: Any) -> None:
        timer.close()
        self._end(cause)

    def _end(self, cause: str) -> None:
        left_out = self._counts.pop(cause, 0) - MAX_LINES
        if left_out > 0:
            self._log.warning("and %d more like these within %g s (%s)", left_out, PERIOD, cause)
