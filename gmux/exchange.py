"""A request with its answer, on its way through the pool."""

from __future__ import annotations

from typing import Protocol

from gmux.codecs.base import Part, Request
from gmux.errors import ExchangeError
from gmux.spool import Spool


class Asker(Protocol):
    """Who makes exchanges: a client. Each exchange ends in one call with a last part or in one `fail`.

    Neither call may switch greenlets or raise: they come from the upstream connection's callback.
    """

    name: str

    def deliver(self, exchange: Exchange, part: Part) -> None: ...

    def fail(self, exchange: Exchange, error: ExchangeError) -> None: ...


class Exchange:
    """One request on its way.

    body      what follows `request.data`, when the request was too large for one piece
    answered  whether a part of the answer was passed on
    retries   how often it was sent again
    is_abandoned  whether the asker is gone
    """

    __slots__ = ("asker", "request", "body", "answered", "retries", "is_abandoned")

    def __init__(self, asker: Asker, request: Request, body: Spool | None = None) -> None:
        self.asker = asker
        self.request = request
        self.body = body
        self.answered = False
        self.retries = 0
        self.is_abandoned = False

    def close(self) -> None:
        """Give back what the request holds."""
        if self.body is not None:
            self.body.close()
