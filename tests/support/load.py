"""Clients that ask one request after another while something happens to gmux."""

from __future__ import annotations

from itertools import count

import gevent

from tests.support.clients import Client, tagged
from tests.support.wait import PATIENCE, wait_until


class Load:
    """Each client has a connection, and makes another one when it is closed, until none is taken any more.

    An answer that is not the client's own fails, as does one that breaks off. Use it in a `with`.
    """

    def __init__(self, address: tuple[str, int], clients: int = 20) -> None:
        self.answered = 0
        #: Requests that got a closed connection for an answer.
        self.cut = 0
        self._address = address
        self._greenlets = [gevent.spawn(self._run, n) for n in range(clients)]

    def __enter__(self) -> Load:
        self.wait_answers()
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        gevent.killall(self._greenlets)
        if kind is None:
            gevent.joinall(self._greenlets, raise_error=True)

    def wait_answers(self, number: int = 100) -> None:
        """Until so many more have come."""
        number += self.answered
        wait_until(lambda: self.answered >= number or self._raise(), what=f"answers: {self!r}")

    def wait_end(self) -> None:
        """Until no client is taken any more."""
        gevent.joinall(self._greenlets, PATIENCE, raise_error=True)
        assert all(greenlet.ready() for greenlet in self._greenlets), "clients are still taken"

    def _raise(self) -> None:
        gevent.joinall([greenlet for greenlet in self._greenlets if greenlet.exception], raise_error=True)

    def _run(self, n: int) -> None:
        numbers = count()
        while True:
            try:
                client = Client(self._address)
            except (ConnectionRefusedError, ConnectionResetError):
                return
            with client:
                while client.outcome(tagged(n, next(numbers))) == "answered":
                    self.answered += 1
                self.cut += 1

    def __repr__(self) -> str:
        alive = sum(not greenlet.ready() for greenlet in self._greenlets)
        return f"clients {alive}, answered {self.answered}, cut {self.cut}"
