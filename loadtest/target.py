"""A target for load: each request gets its own answer a set time later, and so many connections are served.

Usage: target.py [options]

Options:
  --proto NAME         echo, http or iso8583 [default: http]
  --port PORT          where to listen, on 127.0.0.1; 0 is any free port [default: 0]
  --max-connections N  served at once; more are refused [default: 1]
  --delay TIME         time of service of each request, such as 2ms [default: 0]
  -h --help            show this help and exit

At its end, on INT or TERM, it prints a line of JSON: what it has accepted, refused and answered, and the most
connections that were open at once.
"""

from __future__ import annotations

import heapq
import json
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event

from gmux import net
from gmux.errors import StartError
from gmux.samples import command
from gmux.samples.target import Target
from loadtest import options
from loadtest.protocols import BadAnswer, Protocol

HOST = "127.0.0.1"


class LoadTarget(Target):
    """Reads on while requests are served: the times of service on one connection overlap, as in a host.

    Answers come in the order of their requests, unless the protocol needs none: then each time of service is drawn from
    half to one and a half of `delay`, so that answers overtake each other.
    """

    def __init__(self, protocol: Protocol, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.dialect = protocol
        self.peak = self.requests = 0

    def converse(self, sock: Any, address: Any) -> None:
        self.peak = max(self.peak, self.open)
        outbox = Outbox(sock.sendall)
        buffer = bytearray()
        try:
            while data := sock.recv(net.READ_SIZE):
                buffer += data
                answers = []
                while (request := self.dialect.cut(buffer)) is not None:
                    answers.append(self.dialect.answer(request))
                self.requests += len(answers)
                if self.service_time:
                    for answer in answers:
                        outbox.put(monotonic() + self._service_time(), answer)
                elif answers:
                    sock.sendall(b"".join(answers))
        except BadAnswer as error:
            self.report(f"closed: {net.format_address(address)}, {error}")
        finally:
            outbox.close()

    def _service_time(self) -> float:
        return self.service_time if self.dialect.is_ordered else self.service_time * random.uniform(0.5, 1.5)


class Outbox:
    """Answers that wait for their time, and the greenlet that sends them."""

    def __init__(self, send: Callable[[bytes], Any]) -> None:
        self._send = send
        self._waiting: list[tuple[float, int, bytes]] = []
        self._count = 0
        self._came = Event()
        self._greenlet = gevent.spawn(self._run)

    def put(self, due: float, answer: bytes) -> None:
        self._count += 1
        heapq.heappush(self._waiting, (due, self._count, answer))
        self._came.set()

    def close(self) -> None:
        self._greenlet.kill(block=False)

    def _run(self) -> None:
        # The reader finds the end of the connection too, and ends it.
        with suppress(OSError):
            while True:
                answers = []
                while self._waiting and self._waiting[0][0] <= monotonic():
                    answers.append(heapq.heappop(self._waiting)[2])
                if answers:
                    self._send(b"".join(answers))
                    continue
                self._came.clear()
                self._came.wait(max(0.0, self._waiting[0][0] - monotonic()) if self._waiting else None)


def main() -> None:
    words = command.parse(__doc__)
    protocol = options.protocol(words)
    address = HOST, options.whole(words, "--port", 0, 65535)
    limit = options.whole(words, "--max-connections", 1, 9999)
    delay = options.delay(words, "--delay")
    try:
        target = LoadTarget(protocol, address, limit, delay, report=lambda line: print(line, flush=True))
    except StartError as error:
        command.fail(1, str(error))
    stopping = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stopping.set)
    target.start()
    print(f"{protocol.name} target listening on {net.format_address(target.address)}", flush=True)
    stopping.wait()
    summary = {"accepted": target.served, "refused": target.refused, "peak": target.peak, "requests": target.requests}
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
