"""The descriptors of a worker: clients leave those that connections to the targets may still need."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

#: Kept for what is opened for a moment: names that are looked up, files of slots, a temporary file, a log.
SPARE = 8

#: An upstream connection has one, and so has its slot.
OF_UPSTREAM = 2


class Descriptors:
    """How many the process may have, and what its pools may still open."""

    def __init__(self) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = sys.maxsize if limit == resource.RLIM_INFINITY else limit
        self._pools: list[Callable[[], int]] = []

    def reserve(self, unmade: Callable[[], int]) -> None:
        """Keep those of the connections that a pool may still make; `unmade` is their number."""
        self._pools.append(unmade)

    def may_be_a_client(self, descriptor: int) -> bool:
        """Whether the rest is enough for the targets when a client has this one, the lowest that was free.

        With more connections than descriptors, clients have half of them.
        """
        if descriptor < self._limit // 2:
            return True
        return descriptor < self._limit - SPARE - OF_UPSTREAM * sum(unmade() for unmade in self._pools)
