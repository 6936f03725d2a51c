"""The access log: a line for each request of a client, from when it is whole, or refused, to its end.

Lines are collected and written some times a second, in one write. Who a request belongs to and where it is, is told by
its client (`gmux.recorded_client`) and by the pool; without an access log neither has anything to tell.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from time import monotonic
from typing import Any

from gevent import get_hub

from gmux import logs
from gmux.config import ServiceConfig
from gmux.exchange import Exchange

#: Seconds for which lines are collected.
INTERVAL = 0.1

#: Outcomes beside the causes of errors.
ANSWERED, CLIENT_GONE, STOPPED, CODEC_FAILED = "answered", "client-gone", "gmux/stop", "gmux/codec"

TEXT = (
    "route=%s client=%%s upstream=%%s request_bytes=%%d answer_bytes=%%d queued_ms=%%.3f held_ms=%%.3f total_ms=%%.3f"
    " outcome=%%s"
)
JSON = (
    '"route": "%s", "client": %%s, "upstream": %%s, "request_bytes": %%d, "answer_bytes": %%d, "queued_ms": %%.3f,'
    ' "held_ms": %%.3f, "total_ms": %%.3f, "outcome": "%%s"}'
)

# A client of a Unix socket chooses its name, which may hold anything.
quote = lru_cache(maxsize=1024)(json.dumps)


class Record:
    """A request under way. Times are 0 until they are known: when it was put on a connection, when it was answered."""

    __slots__ = ("exchange", "client", "upstream", "request_bytes", "answer_bytes", "began", "put", "answered")

    def __init__(self, exchange: Exchange, client: str) -> None:
        self.exchange = exchange
        self.client = client
        self.upstream = "-"
        size = len(exchange.request.data)
        self.request_bytes = size if exchange.body is None else size + len(exchange.body)
        self.answer_bytes = 0
        self.put = self.answered = 0.0
        self.began = monotonic()


class AccessLog:
    """Made once in a worker, which closes it at its end, however that comes."""

    def __init__(self, config: ServiceConfig) -> None:
        self._is_json = config.log_format == "json"
        self._file = logs.access_file(config)
        self._file.reopen()
        self._file.retry_in(get_hub().loop)
        self._routes: list[RouteAccess] = []
        self._lines: list[str] = []
        self._timer: Any = None

    def of_route(self, name: str) -> RouteAccess:
        route = RouteAccess(self, (JSON if self._is_json else TEXT) % (name or "-"))
        self._routes.append(route)
        return route

    def reopen(self) -> None:
        """Open the file anew, because logrotate has moved it. Never raises."""
        self._flush()
        self._file.reopen()

    def close(self) -> None:
        """Write what there is; requests still under way end here."""
        for route in self._routes:
            route.stop()
        self._flush()
        self._file.flush(logs.PATIENCE)
        self._file.close()

    def add(self, line: str) -> None:
        self._lines.append(line)
        if self._timer is None:
            self._timer = get_hub().loop.timer(INTERVAL)
            self._timer.start(self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._flush()

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        # All of them ended within the last INTERVAL; to ask the time for each would double the cost of a line.
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        begin = f'{{"time": "{now}", ' if self._is_json else now + " "
        text = "".join([f"{begin}{line}\n" for line in lines])
        self._file.write(text.encode(errors="backslashreplace"))


class RouteAccess:
    """The requests of one route that are under way, by their exchanges."""

    def __init__(self, log: AccessLog, template: str) -> None:
        self._add = log.add
        self._template = template
        self._records: dict[Exchange, Record] = {}

    def begin(self, exchange: Exchange, client: str) -> Record:
        """The request is whole. `client` is its name, quoted."""
        record = self._records[exchange] = Record(exchange, client)
        return record

    def put(self, exchange: Exchange, upstream: str) -> None:
        """It is put on an upstream connection, perhaps not for the first time."""
        record = self._records.get(exchange)
        if record is not None:  # else it is gmux's own, or its client is gone
            record.upstream = upstream
            record.put = monotonic()

    def end(self, record: Record, outcome: str) -> None:
        if self._records.pop(record.exchange, None) is None:
            return  # `stop` has ended it
        now = monotonic()
        answered = record.answered or now
        put = record.put or answered
        self._add(
            self._template
            % (
                record.client,
                quote(record.upstream),
                record.request_bytes,
                record.answer_bytes,
                (put - record.began) * 1000,
                (answered - put) * 1000,
                (now - record.began) * 1000,
                outcome,
            )
        )

    def refuse(self, client: str, outcome: str) -> None:
        """What a client sent is no request, or was not whole when it was refused."""
        self._add(self._template % (client, '"-"', 0, 0, 0, 0, 0, outcome))

    def stop(self) -> None:
        for record in list(self._records.values()):
            self.end(record, STOPPED)
