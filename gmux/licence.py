"""Whether requests may be put behind one another, by order, on the connections to one target.

    state       left by
    unknown     `grant`, `refuse`
    granted     `refuse`, after a sign of a lost request
    refused     `grant`, when the pause is over

Without a licence requests go one by one. Nobody waits for the pause: `is_due` is asked when a connection is free.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

#: Seconds from a refusal to the next try. The pause doubles with each refusal, up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0

#: Seconds that a licence must hold before the refusals that came earlier are forgotten.
TRUSTED_AFTER = 600.0


class Licence:
    """`is_granted` is read for each request that would be put behind another; only the methods here set it."""

    __slots__ = ("is_granted", "_clock", "_granted_at", "_next_try", "_refusals")

    def __init__(self, is_granted: bool, clock: Callable[[], float] = monotonic) -> None:
        """`is_granted`: from the start, where no evidence can be had. `clock` returns seconds that never go back."""
        self.is_granted = is_granted
        self._clock = clock
        self._granted_at = self._next_try = clock()
        self._refusals = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time to try for the licence."""
        return not self.is_granted and self._clock() >= self._next_try

    def grant(self) -> None:
        self.is_granted = True
        self._granted_at = self._clock()

    def refuse(self) -> float:
        """Take the licence away, or go on without it; returns the seconds until the next try."""
        now = self._clock()
        if self.is_granted and now - self._granted_at >= TRUSTED_AFTER:
            self._refusals = 0
        pause: float = min(FIRST_PAUSE * 2 ** min(self._refusals, 16), LONGEST_PAUSE)
        self._refusals += 1
        self._next_try = now + pause
        self.is_granted = False
        return pause
