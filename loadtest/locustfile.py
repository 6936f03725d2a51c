"""Users of locust for gmux: each keeps one connection, asks at a fixed pace, and takes no answer but its own.

Run it in the checkout, by hand with a web page or headless:

    locust -f loadtest/locustfile.py --host 127.0.0.1:8000
    locust -f loadtest/locustfile.py --host 127.0.0.1:8000 --proto echo --headless -u 50 -r 50 -t 10s

In a process of locust the sockets of the standard library are those of gevent.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from locust import User, events, task
from locust.env import Environment

from loadtest.protocols import PROTOCOLS, BadAnswer, Protocol

#: Seconds that a user waits for an answer, or for a connection: as long as gmux lets a request wait.
PATIENCE = 30.0

NUMBERS = itertools.count(1)


class LoadUser(User):
    """One client: a connection that is made again when it was lost, and the requests on it, one after the other."""

    abstract = True
    protocol: Protocol

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._number = next(NUMBERS)
        options: Any = environment.parsed_options
        self._period: float = 1 / options.rate
        # With a seed: the users of each run come at the same moments.
        self._dice = random.Random(self._number)
        self._turns = itertools.count()
        self._began = 0.0
        self._sock: socket.socket | None = None

    def on_start(self) -> None:
        self._began = time.perf_counter()
        self._connect()
        time.sleep(self.wait_time())

    def on_stop(self) -> None:
        self._close()

    def wait_time(self) -> float:
        """Once in each period, at a random moment of it.

        A user without a pause would measure how fast the target can go, and load a fast way more than a slow one. At a
        pace that no answer changes, the offered load is the same on all ways, and what a way adds can be read off. The
        moments are random, because users in step would always, or never, wait for each other.
        """
        due = self._began + (next(self._turns) + self._dice.random()) * self._period
        return max(0.0, due - time.perf_counter())

    @task
    def ask(self) -> None:
        if self._sock is None and not self._connect():
            return
        request = self.protocol.request(self._number, next(NUMBERS))
        answer = b""
        began = time.perf_counter()
        try:
            answer = self._exchange(request)
            self.protocol.check(request, answer)
        except (OSError, BadAnswer) as error:
            self._fail("request", began, error, f"asked {request!r}, got {answer!r}")
        else:
            self._report("request", began, len(answer))

    def _exchange(self, request: bytes) -> bytes:
        assert self._sock is not None
        self._sock.sendall(request)
        buffer = bytearray()
        while (answer := self.protocol.cut(buffer)) is None:
            data = self._sock.recv(65536)
            if not data:
                raise BadAnswer("closed in an answer" if buffer else "closed without an answer")
            buffer += data
        if buffer:
            raise BadAnswer("more than one answer")
        return answer

    def _connect(self) -> bool:
        began = time.perf_counter()
        try:
            self._sock = socket.create_connection(parse_host(self.host or ""), PATIENCE)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, ValueError) as error:
            self._fail("connect", began, error, "not connected")
            return False
        return True

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _fail(self, what: str, began: float, error: Exception, detail: str) -> None:
        # An answer that comes later would be taken for the next one.
        self._close()
        if isinstance(error, TimeoutError):
            error = BadAnswer(f"no answer within {PATIENCE:g} s")
        self._report(what, began, 0, error)
        logging.getLogger(__name__).debug("%s: %s", error, detail)

    def _report(self, what: str, began: float, size: int, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=self.protocol.name,
            name=what,
            response_time=(time.perf_counter() - began) * 1000,
            response_length=size,
            exception=error,
            context={},
        )


class EchoUser(LoadUser):
    protocol = PROTOCOLS["echo"]


class HttpUser(LoadUser):
    protocol = PROTOCOLS["http"]


class Iso8583User(LoadUser):
    protocol = PROTOCOLS["iso8583"]


class Figures:
    """What locust rounds or forgets: each answer time behind the warm-up, and all failures, those before it too."""

    def __init__(self, environment: Environment, path: Path, warmup: float) -> None:
        self._environment = environment
        self._path = path
        self._warmup = warmup
        self._times: list[float] = []
        self._failures: Counter[str] = Counter()
        self._began = self._ended = self._cpu = 0.0
        environment.events.request.add_listener(self._add)
        environment.events.spawning_complete.add_listener(self._begin)
        environment.events.test_stop.add_listener(self._end)
        environment.events.quitting.add_listener(self._write)

    def _add(self, name: str, response_time: float, exception: Exception | None, **rest: Any) -> None:
        if exception is None:
            self._times.append(response_time)
        else:
            self._failures[f"{name}: {exception}"] += 1

    def _begin(self, **rest: Any) -> None:
        gevent.spawn_later(self._warmup, self._reset)

    def _reset(self) -> None:
        self._environment.stats.reset_all()
        self._times.clear()
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def _end(self, **rest: Any) -> None:
        self._ended, self._cpu = time.perf_counter(), time.process_time() - self._cpu

    def _write(self, environment: Environment, **rest: Any) -> None:
        if self._failures:
            environment.process_exit_code = 1
        seconds = self._ended - self._began
        self._path.write_text(
            json.dumps({"seconds": seconds, "cpu": self._cpu, "times": self._times, "failures": self._failures})
        )


def parse_host(text: str) -> tuple[str, int]:
    """Raises ValueError, which names the setting."""
    try:
        parts = urlsplit(text if "://" in text else f"tcp://{text}")
        port = parts.port or {"http": 80}.get(parts.scheme)
    except ValueError:
        port = None
    if not port or not parts.hostname or parts.scheme not in ("tcp", "http"):
        raise ValueError(f"--host: {text!r} is not allowed: HOST:PORT, tcp://HOST:PORT or http://HOST:PORT")
    return parts.hostname, port


def positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


@events.init_command_line_parser.add_listener
def _add_arguments(parser: Any) -> None:
    # Whoever reaches the page can load any host from here.
    parser.set_defaults(web_host="127.0.0.1")
    group = parser.add_argument_group("gmux")
    group.add_argument("--proto", choices=list(PROTOCOLS), default="http", help="protocol of the users (default: http)")
    group.add_argument("--rate", type=positive, default=10.0, help="requests per second of each user (default: 10)")
    group.add_argument("--warmup", type=float, default=0.0, help="seconds left out of the figures (default: 0)")
    group.add_argument("--figures", type=Path, help="file for each answer time and all failures, as JSON")


@events.init.add_listener
def _choose(environment: Environment, **rest: Any) -> None:
    options: Any = environment.parsed_options
    users: Any = environment.user_classes
    if not options.user_classes and not options.class_picker:
        environment.user_classes = [user for user in users if user.protocol.name == options.proto]
    if options.figures:
        Figures(environment, options.figures, options.warmup)
