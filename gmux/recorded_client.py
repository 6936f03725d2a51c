"""A client whose requests are told to the access log. A class of its own, so that others pay nothing for it."""

from __future__ import annotations

import socket
from time import monotonic

from gmux.access import ANSWERED, CLIENT_GONE, CODEC_FAILED, STOPPED, Record, RouteAccess, quote
from gmux.client import Client, Clients
from gmux.codecs.base import Part
from gmux.errors import ExchangeError
from gmux.exchange import Exchange


class RecordedClient(Client):
    """`_record` is of its request under way, until the client has taken the last byte of the answer."""

    __slots__ = ("_access", "_quoted_name", "_record")

    def __init__(self, access: RouteAccess, shared: Clients, sock: socket.socket, name: str, host: str) -> None:
        super().__init__(shared, sock, name, host)
        self._access = access
        self._quoted_name = quote(name)
        self._record: Record | None = None

    def _end_record(self, outcome: str) -> None:
        record, self._record = self._record, None
        if record is not None:
            self._access.end(record, outcome)

    def _end_when_taken(self) -> None:
        if self._record is not None and self._record.answered and self._outbox is None:
            self._end_record(ANSWERED)

    def _checkout(self, exchange: Exchange) -> None:
        self._record = self._access.begin(exchange, self._quoted_name)
        super()._checkout(exchange)

    def deliver(self, exchange: Exchange, part: Part) -> None:
        record = self._record
        if record is not None and record.exchange is exchange:
            record.answer_bytes += len(part.data)
            if part.last:
                record.answered = monotonic()
        super().deliver(exchange, part)

    def fail(self, exchange: Exchange, error: ExchangeError) -> None:
        if self._record is not None and self._record.exchange is exchange:
            self._end_record(error.cause)
        super().fail(exchange, error)

    def _write(self, data: bytes) -> None:
        super()._write(data)
        self._end_when_taken()

    def _stop_writing(self) -> None:
        super()._stop_writing()
        self._end_when_taken()

    # Other ends. The first one tells the outcome: what it leads to finds no record any more.

    def _warn(self, error: ExchangeError) -> None:
        self._end_record(error.cause)
        super()._warn(error)

    def _refuse_incoming(self, error: ExchangeError) -> None:
        self._access.refuse(self._quoted_name, error.cause)
        super()._refuse_incoming(error)

    def _codec_failed(self) -> None:
        self._access.refuse(self._quoted_name, CODEC_FAILED)
        super()._codec_failed()

    def abort(self) -> None:
        self._end_record(STOPPED)
        super().abort()

    def _close(self) -> None:
        self._end_record(CLIENT_GONE)
        super()._close()
