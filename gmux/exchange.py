"""A request with its answer, on its way through the pool."""

from __future__ import annotations

from time import monotonic
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

    began     when it was whole and could be sent, by `monotonic`: what bounds the time in which it is sent again
    body      what follows `request.data`, when the request was too large for one piece
    answered  whether the target has begun to answer
    told      whether the asker was given a part of the answer
    retries   how often it was sent again as the one whose answer was due
    repeats   how often it was sent again in all
    is_abandoned  whether the asker is gone
    upstream  of a pipelined one, the connection that it is on
    begin     of a pipelined one, the bytes that its connection was given before its own first one
    end       the same, up to its own last one
    """

    __slots__ = (
        "asker",
        "request",
        "body",
        "began",
        "answered",
        "told",
        "retries",
        "repeats",
        "is_abandoned",
        "upstream",
        "begin",
        "end",
    )

    upstream: object
    begin: int
    end: int

    def __init__(self, asker: Asker, request: Request, body: Spool | None = None) -> None:
        self.asker = asker
        self.request = request
        self.body = body
        self.began = monotonic()
        self.answered = self.told = False
        self.retries = self.repeats = 0
        self.is_abandoned = False

    def close(self) -> None:
        """Give back what the request holds."""
        if self.body is not None:
            self.body.close()
